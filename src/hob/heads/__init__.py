"""Heads: small classifiers over the shared model's hidden states. What the daemon needs to serve them: NumPy, no more.

Trained by `hob.tasks` (scikit-learn), kept by `store.py`, served by `api/tasks.py`.
"""

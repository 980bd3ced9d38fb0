"""Classification with a small model: zero-shot, measured on real data, and heads trained on the device.

Speaks to the daemon over its socket only, so any OpenAI-compatible server that echoes log-probabilities is measured by
the same code. Training and evaluation need the extra `tasks` (scikit-learn, matplotlib); using a trained head does not.
"""

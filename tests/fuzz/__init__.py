"""Hostile files and texts by the million: see `__main__.py`."""

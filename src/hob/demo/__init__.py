"""`hob demo`: three programs share one model, then three private copies do the same work. Everything really runs."""

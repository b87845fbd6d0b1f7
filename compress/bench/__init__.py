"""Time what the methods promise against the best dense way, in one run, and keep the rows."""

"""Serves requests: the model's process, its answers, and their measurements."""

"""Serves requests: the model's process, the OpenAI-compatible API, and its measurements."""

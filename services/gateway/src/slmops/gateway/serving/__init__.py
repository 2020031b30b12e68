"""Answers requests: the model's process, the OpenAI-compatible API, and what is measured of it."""

"""The HTTP API: OpenAI-compatible requests in, checks, and replies out."""

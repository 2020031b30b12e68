"""Golden prompts, and the format in which a model is asked."""

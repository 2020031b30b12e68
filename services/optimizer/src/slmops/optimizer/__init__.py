"""Turns a model version into gated variants for device profiles."""

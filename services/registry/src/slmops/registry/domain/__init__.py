"""Decisions about versions of a model. Pure."""

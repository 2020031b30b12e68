"""Decisions about the versions of a model. Pure."""

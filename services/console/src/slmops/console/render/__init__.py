"""Renders answers as tables, and progress."""

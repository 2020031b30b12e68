"""Measures a variant against its reference: quality, speed, memory and energy."""

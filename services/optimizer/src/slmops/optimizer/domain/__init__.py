"""Gate, front, choice, and what a search tries next: pure decisions on recipes and measurements."""

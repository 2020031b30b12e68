"""Recipes: decides which recipes a job tries, in which order, and which earlier results it reuses."""

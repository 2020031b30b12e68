"""Recipes: what a job tries, in which order, and what it reuses of earlier jobs."""

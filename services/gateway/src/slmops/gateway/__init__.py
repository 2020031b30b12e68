"""The edge agent: verifies, swaps, serves, measures, works offline."""

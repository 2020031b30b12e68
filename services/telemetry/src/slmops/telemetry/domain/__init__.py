"""Decides which measurements of gateways count, and sums them into windows."""

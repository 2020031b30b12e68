"""Tells the control plane: reports and measurements, kept on disk until the bus has them."""

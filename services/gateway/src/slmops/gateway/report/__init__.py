"""Sends reports and measurements, kept on disk until the bus has acknowledged them."""

"""Installs releases: download, verification, slots, probe, and revert."""

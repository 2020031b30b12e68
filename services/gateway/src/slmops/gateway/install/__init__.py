"""Brings a release onto the device: download, verification, slots, probe, and the way back."""

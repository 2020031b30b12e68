"""The operator's edge: the command line `slmops`."""

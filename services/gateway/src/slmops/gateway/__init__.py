"""The edge agent. It verifies, installs, serves and measures releases, also without a network."""

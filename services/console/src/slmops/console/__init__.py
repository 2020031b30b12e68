"""The command line `slmops`, for operators."""

"""The optimizer makes variants of a model version for device profiles, measures them and checks them against limits."""

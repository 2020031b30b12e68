"""Fleet inventory, blueprints, staged rollouts, gates and rollback."""

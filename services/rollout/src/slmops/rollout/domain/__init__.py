"""What a rollout is and how it is decided. Pure: time, inventory and measurements are passed in."""

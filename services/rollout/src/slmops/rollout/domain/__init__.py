"""The state of rollouts and the decisions about them. Pure: time, inventory and measurements are parameters."""

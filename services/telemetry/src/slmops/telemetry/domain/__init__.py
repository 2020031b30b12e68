"""What counts of what gateways measure, and the windows that it is summed into."""

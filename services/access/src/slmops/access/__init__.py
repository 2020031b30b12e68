"""The access service: who may use the system, and which keys the server refuses."""

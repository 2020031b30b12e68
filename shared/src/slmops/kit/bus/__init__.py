"""NATS: connections, consumers, dead letters, streams and credentials."""

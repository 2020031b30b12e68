"""Runs jobs: takes them from the queue, runs each in a process of its own, publishes and uploads what came of it."""

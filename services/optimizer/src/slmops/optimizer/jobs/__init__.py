"""Takes jobs from the queue, runs each in its own process, uploads the artifacts and publishes the result."""

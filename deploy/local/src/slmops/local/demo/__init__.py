"""The demo of the main job: from a GGUF file to three answering gateways, and the rejection of a bad version."""

"""The main job, told as it happens: from a GGUF file to three answering gateways, and back from a bad version."""

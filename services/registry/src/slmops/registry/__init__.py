"""What exists: models, versions, variants and packages, where they came from and which alias names them."""

"""The registry of models, versions, variants and packages, with their origins and aliases."""

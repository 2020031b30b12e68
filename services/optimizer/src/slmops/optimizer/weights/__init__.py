"""Arithmetic on weights: quantization grids, sensitivities, codes and adapters."""

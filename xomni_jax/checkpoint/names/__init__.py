"""Declarative name tables, one module per model: PyTorch key to linen path."""

"""Scoring services: the HTTP server and one module per scorer. Nothing here imports training."""

"""One module per training stage, and what they share."""

"""The scoring server and its scorers. Runs apart from training; nothing here imports it."""

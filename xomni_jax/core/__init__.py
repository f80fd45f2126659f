"""What every package may use and which knows nothing of models: configuration, stopping, processes, operation counts."""

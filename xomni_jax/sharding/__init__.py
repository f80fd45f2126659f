"""Where arrays lie: meshes, and one table from logical axes to mesh axes."""

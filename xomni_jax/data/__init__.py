"""Sources of examples: the rendered data set, its grain pipeline, image preprocessing."""

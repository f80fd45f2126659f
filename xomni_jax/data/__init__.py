"""Where examples come from: the rendered embedded data set, grain sources and transforms."""

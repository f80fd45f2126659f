"""Published methods of reinforcement learning, each a stage of its own over the parts of `rl`."""

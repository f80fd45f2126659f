"""The shipped scorers, one module each: its docstring's first line is what `xomni serve-reward --help` says of it."""

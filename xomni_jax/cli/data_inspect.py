"""xomni data inspect: a look at the examples of a source."""

NAME, HELP, ABOUT, EXAMPLE = "inspect", "x", "x", "x"

"""The `xomni` command: thin subcommands that parse, build, call and print."""

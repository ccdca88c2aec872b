"""The command `sppo`: one file a subcommand, each with `add(subparsers)` and `run(args)`."""

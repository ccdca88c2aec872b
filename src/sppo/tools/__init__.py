"""What a policy may call between its turns: one file per tool, each with `build`."""

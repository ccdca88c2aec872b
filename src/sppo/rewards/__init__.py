"""What judges a response. One file each: a name in a recipe is a file here with `build(**options) -> Reward`."""

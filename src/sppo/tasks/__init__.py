"""Where problems come from. One file each: a name in a recipe is a file here with `build(**options) -> TaskSource`."""

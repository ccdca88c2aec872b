"""A recipe: its keys with defaults and bounds, the rules across sections, and the algorithms that are presets of them."""

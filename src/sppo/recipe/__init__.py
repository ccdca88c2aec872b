"""A recipe: its keys with defaults and bounds, the rules that compare keys, and algorithms as presets."""

"""Pure tensor mathematics, one page per idea. See docs/algorithm.md for the whole and the papers."""

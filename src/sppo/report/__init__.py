"""What a run looks like to the person who waits for it."""

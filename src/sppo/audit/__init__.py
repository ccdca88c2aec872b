"""A record of a run that shows any later change."""

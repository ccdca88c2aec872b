"""Trackers: other places for a run's numbers.

One file per tracker, with `build(run, **options)`. `sppo view` needs none.
"""

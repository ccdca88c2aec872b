"""Where else a run's numbers go: one file a tracker, with `build(run, **options)`. None is needed; `sppo view` reads the run itself."""

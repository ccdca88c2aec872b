"""The loop, the learner, supervised starts, the curriculum, checkpoints."""

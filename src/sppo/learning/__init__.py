"""From judged rollouts to new weights."""

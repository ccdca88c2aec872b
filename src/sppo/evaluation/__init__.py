"""How good is a model: accuracy, pass@k and intervals on held-out problems."""

"""Learner ranks and rollout workers beside the driver: actors of Ray, and what stands for them in the loop."""

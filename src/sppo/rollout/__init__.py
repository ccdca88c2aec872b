"""Sampling responses: the engine's socket, the local engine, and collecting judged rollouts."""

"""Policies, critics and the reference, on top of any transformers model."""

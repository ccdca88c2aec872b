"""Fast paths of what a model computes: log-probabilities, attention, elementwise layers; on a CPU in C, on CUDA in Triton."""

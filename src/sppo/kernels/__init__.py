"""Fast paths of a model: log-probabilities, attention, elementwise layers; in C for a CPU, in Triton for CUDA."""

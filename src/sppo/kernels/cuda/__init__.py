"""CUDA paths, of PyTorch's own kernels and Triton."""

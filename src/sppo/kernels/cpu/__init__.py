"""C for CPUs, compiled when first needed."""

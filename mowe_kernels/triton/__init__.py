"""The Triton kernels, one file an op."""

"""Kernels in Triton for NVIDIA GPUs. Nothing here loads triton before a kernel runs."""

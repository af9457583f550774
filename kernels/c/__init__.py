"""Kernels in C for processors, compiled at first use by the system's own compiler."""

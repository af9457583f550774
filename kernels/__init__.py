"""The kernels: they match equations and know no decomposition."""

if __name__ != "tdc.kernels":
    raise ImportError(
        f"this folder is the package 'tdc.kernels': write 'import tdc.kernels' instead of 'import {__name__}'"
    )

"""The passes: each turns one frozen value into the next; only the last touches the user's graph."""

if __name__ != "tdc.passes":
    raise ImportError(
        f"this folder is the package 'tdc.passes': write 'import tdc.passes' instead of 'import {__name__}'"
    )

"""The ONNX door: read a model file, find its sites, run it with onnxruntime, and write a file of standard operators.

``load`` validates an untrusted file, ``match`` finds the sites, ``program`` runs and rewrites, ``emit`` knows how a
block is written in ONNX operators, and ``save`` puts a checked file under its name, all or nothing.
"""

from __future__ import annotations

from .load import file_size, load_model
from .program import OnnxProgram
from .save import save_model

__all__ = ["OnnxProgram", "file_size", "load_model", "save_model"]

"""The names under which people know a weight, from what exporters leave in the file."""

from __future__ import annotations

import re

import onnx_ir as ir

__all__ = ["aliases", "unique_name"]

_FOLDED = "pkg.onnxscript.optimizer.folded_from"
_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"
_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"
_MODULES = ("Linear", "Conv1d", "Conv2d", "Conv3d")
_LONGEST = 10_000


def aliases(root: ir.Value, node: ir.Node) -> tuple[str, ...]:
    """Names of the weight ``root`` that ``node`` reads, the most telling first.

    The dynamo exporter of torch renames a folded weight to ``val_19``, but notes what it was folded from, and the
    modules around each node; the older one names nodes ``/encoder/layer.0/query/MatMul``.
    """
    found: list[str] = []
    folded = _items(root.metadata_props.get(_FOLDED, ""))
    if len(folded) == 1:
        found.append(folded[0])
    if root.name and root.metadata_props.get(_KIND) == "PARAMETER":
        found.append(root.name)
    scopes, classes = _items(node.metadata_props.get(_SCOPES, "")), _items(node.metadata_props.get(_CLASSES, ""))
    if len(scopes) > 1 and scopes[-2] and len(classes) > 1 and classes[-2].endswith(_MODULES):
        found.append(f"{scopes[-2]}.weight")
    if root.name and root.name.startswith("onnx::") and (node.name or "").count("/") > 1:
        found.append(".".join(_scopes(node.name or "")) + ".weight")
    if root.name:
        found.append(root.name)
    return tuple(dict.fromkeys(found))


def _scopes(name: str) -> list[str]:
    """The modules in a name ``/features/features.0/Conv``; a part that begins with the one before it replaces it."""
    parts = name.strip("/").split("/")[:-1]
    return [part for part, after in zip(parts, [*parts[1:], ""], strict=True) if not after.startswith(f"{part}.")]


def _items(text: str) -> list[str]:
    """The strings of a printed Python list; nothing is evaluated."""
    return re.findall(r"'([^']*)'", text[:_LONGEST])


def unique_name(wanted: str, taken: set[str]) -> str:
    """``wanted``, or ``wanted_1`` and so on; the name is taken from now on."""
    name, k = wanted, 0
    while name in taken:
        k += 1
        name = f"{wanted}_{k}"
    taken.add(name)
    return name

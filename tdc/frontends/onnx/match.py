"""Where a constant weight acts linearly: a table from operator to matcher, and the merging of tied weights.

A use is ``y = x W^T`` in some spelling. The canonical weight W is (o, i) whatever the storage; the activation has its
input axis last (``x``) or second to last (``x^T``), and so has the output.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
from torch import Tensor

from ...ir import Decline, OpKind, Remark, Site
from ..program import passed_over_weight, sketch
from .names import aliases
from .tensors import FLOATS, array, constants, graphs, stored, to_torch

__all__ = ["MATCHERS", "Linear", "Match", "Use", "canonical", "find_sites", "opset"]

STAGE = "find-sites"
OLDEST_OPSET = 7
"""Broadcasting is numpy's from this opset on."""
NEGATIVE_AXES_OPSET = 11

_QUANTISED = ("DequantizeLinear", "QuantizeLinear", "MatMulInteger", "ConvInteger", "QLinear", "QGemm", "MatMulNBits")


@dataclass(frozen=True, slots=True)
class Linear:
    """How one operator reads a weight: which input is the activation, and how the axes lie."""

    data: int
    stored_oi: bool
    input_last: bool
    output_last: bool


@dataclass(frozen=True, eq=False, slots=True)
class Use:
    """One operator that reads the weight ``root``, through ``chain`` (Transpose and Identity nodes).

    ``flipped``: the canonical weight is the transpose of the stored one. ``rank`` of the activation where it matters.
    """

    node: ir.Node
    linear: Linear
    root: ir.Value
    chain: tuple[ir.Node, ...]
    flipped: bool
    rank: int | None

    @property
    def activation(self) -> ir.Value:
        value = self.node.inputs[self.linear.data]
        assert value is not None
        return value


@dataclass(frozen=True, eq=False)
class Match:
    """A site with all its uses, in node order."""

    site: Site
    uses: tuple[Use, ...]

    @property
    def roots(self) -> Mapping[ir.Value, bool]:
        """Every stored copy of the weight, and whether it is stored transposed."""
        return {use.root: use.flipped for use in self.uses}

    def weight(self) -> Tensor:
        """The canonical weight (o, i)."""
        return canonical(self.uses[0].root, self.uses[0].flipped)


@dataclass(eq=False)
class _Root:
    """A constant with what reads it."""

    value: ir.Value
    tensor: ir.TensorProtocol
    uses: list[Use] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    hashes: tuple[str, str] | None = None

    @property
    def name(self) -> str:
        return self.value.name or ""

    def digest(self, flipped: bool) -> str:
        """A digest of the entries in canonical order."""
        if self.hashes is None:
            matrix = array(self.tensor)
            self.hashes = (_digest(matrix), _digest(matrix.T))
        return self.hashes[flipped]


def _digest(matrix: np.ndarray) -> str:
    digest = hashlib.sha256(f"{matrix.dtype.name} {matrix.shape}".encode())
    step = max(1, (1 << 22) // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        digest.update(np.ascontiguousarray(matrix[start : start + step]).tobytes())
    return digest.hexdigest()


def canonical(root: ir.Value, flipped: bool) -> Tensor:
    """The stored tensor of an initializer or Constant output as a canonical weight (o, i), contiguous."""
    tensor = stored(root)
    assert tensor is not None
    matrix = to_torch(array(tensor))
    return (matrix.T if flipped else matrix).contiguous()


def opset(model: ir.Model) -> int:
    """Version of the standard operators; 0 if the model imports none."""
    versions = model.graph.opset_imports
    return versions.get("", versions.get("ai.onnx", 0))


def _matmul(node: ir.Node, operand: int, rank: int | None) -> Linear | Decline:
    if operand == 1:
        return Linear(data=0, stored_oi=False, input_last=True, output_last=True)
    if rank is None:
        return Decline("MatMul: the rank of the activation on its right is unknown")
    return Linear(data=1, stored_oi=True, input_last=rank == 1, output_last=rank == 1)


def _gemm(node: ir.Node, operand: int, rank: int | None) -> Linear | Decline:
    trans_a, trans_b = (bool(node.attributes.get_int(key, 0)) for key in ("transA", "transB"))
    if operand == 2:
        return Decline("Gemm: a bias is not decomposed")
    if operand == 1:
        return Linear(data=0, stored_oi=trans_b, input_last=not trans_a, output_last=True)
    return Linear(data=1, stored_oi=not trans_a, input_last=trans_b, output_last=False)


MATCHERS: Mapping[str, Callable[[ir.Node, int, int | None], Linear | Decline]] = {"MatMul": _matmul, "Gemm": _gemm}
"""Operator -> matcher of (node, index of the weight among its inputs, rank of the activation if known)."""

_REASONS = {
    "Gather": "Gather: embeddings are not decomposed",
    "GatherND": "GatherND: embeddings are not decomposed",
    "Cast": "Cast: the weight is used in another precision",
}


class _Finder:
    """One search over one model."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph = model, model.graph
        self.opset = opset(model)
        self.order = {node: k for k, node in enumerate(self.graph)}
        self.remarks: list[Remark] = []
        self._ranks: dict[str, int] | None = None

    def find(self) -> tuple[Match, ...]:
        roots = [root for root in (self._root(v, t) for v, t in constants(self.graph)) if root is not None]
        matches = []
        for group in _tied(roots):
            uses = sorted((use for root in group for use in root.uses), key=lambda use: self.order[use.node])
            if uses:
                match = self._match(group, tuple(uses))
                if match is not None:
                    matches.append(match)
            else:
                for root in group:
                    if root.refusals and _sizeable(root.tensor):
                        self._remark(root.name, root.refusals[0])
        self._elsewhere()
        matches.sort(key=lambda match: self.order[match.uses[0].node])
        return _numbered(matches)

    def _remark(self, name: str | None, reason: str) -> None:
        self.remarks.append(Remark(name or "", STAGE, reason))

    def _root(self, value: ir.Value, tensor: ir.TensorProtocol) -> _Root | None:
        """What reads a constant, None if it is no candidate at all."""
        if len(tensor.shape) < 2 or not (value.uses() or value.is_graph_output()):
            return None
        if tensor.dtype not in FLOATS:
            reason = _foreign(value, tensor)
            if reason:
                self._remark(value.name, reason)
            return None
        if value.is_graph_input():
            if _sizeable(tensor):
                self._remark(value.name, "the caller may override it: it is a graph input")
            return None
        root = _Root(value, tensor)
        self._trace(root, value, False, ())
        return root

    def _trace(self, root: _Root, value: ir.Value, turned: bool, chain: tuple[ir.Node, ...]) -> None:
        """Follow a constant through Transpose and Identity to the operators that read it."""
        if value.is_graph_output():
            root.refusals.append("it is an output of the graph")
        for node, operand in value.uses():
            if node.graph is not self.graph:
                root.refusals.append("used in a subgraph")
                continue
            turn = _turn(node, len(root.tensor.shape))
            if turn is not None:
                self._trace(root, node.outputs[0], turned ^ turn, (*chain, node))
                continue
            rank = self._needed_rank(node, operand)
            linear = self._linear(root, node, operand, rank)
            if isinstance(linear, Decline):
                root.refusals.append(linear.reason)
            else:
                root.uses.append(Use(node, linear, root.value, chain, turned ^ (not linear.stored_oi), rank))

    def _needed_rank(self, node: ir.Node, operand: int) -> int | None:
        """Rank of the activation, looked for only where the matcher or the axes of old opsets need it."""
        if node.op_type != "MatMul":
            return 2 if node.op_type == "Gemm" else None
        other = node.inputs[1 - operand]
        needed = operand == 0 or self.opset < NEGATIVE_AXES_OPSET
        return self.rank(other) if needed and other is not None else None

    def _linear(self, root: _Root, node: ir.Node, operand: int, rank: int | None) -> Linear | Decline:
        matcher = MATCHERS.get(node.op_type) if node.domain == "" else None
        if matcher is None:
            return Decline(_REASONS.get(node.op_type, f"{node.op_type}: not handled"))
        if len(root.tensor.shape) != 2:
            return Decline(f"{node.op_type}: the weight has rank {len(root.tensor.shape)}, not 2")
        if self.opset < OLDEST_OPSET:
            return Decline(f"opset {self.opset} is older than {OLDEST_OPSET}, where operators broadcast in another way")
        other = node.inputs[1 - operand] if operand < 2 else None
        linear = matcher(node, operand, rank)
        if isinstance(linear, Linear):
            if other is None or _is_constant(other):
                return Decline(f"{node.op_type}: both operands are constant")
            if self.opset < NEGATIVE_AXES_OPSET and rank is None:
                return Decline(f"opset {self.opset} has no negative axes, and the rank of the activation is unknown")
        return linear

    def rank(self, value: ir.Value) -> int | None:
        """Rank of a value, by shape inference on a copy where the file does not say."""
        if value.shape is not None:
            return value.shape.rank()
        if self._ranks is None:
            self._ranks = _inferred_ranks(self.model)
        return self._ranks.get(value.name or "")

    def _match(self, group: list[_Root], uses: tuple[Use, ...]) -> Match | None:
        first = uses[0]
        names = tuple(dict.fromkeys([*aliases(first.root, first.node), *(root.name for root in group)]))
        refused = [reason for root in group for reason in root.refusals]
        reason = ""
        if refused:
            reason = f"{refused[0]}; its {len(uses)} linear use(s) stay dense with it"
        elif not _one_canonical(group, uses):
            reason = "used both as it is and transposed"
        weight = canonical(first.root, first.flipped)
        reason = reason or passed_over_weight(weight)
        if not reason and min(weight.shape) < 2:
            reason = f"the weight of shape {list(weight.shape)} has rank 1 already"
        if reason:
            self._remark(names[0], reason)
            return None
        o, i = weight.shape
        dtype = FLOATS[group[0].tensor.dtype]
        site = Site(OpKind.LINEAR, (("o", o), ("i", i)), dtype, 0, sketch(weight), names, len(uses))
        return Match(site, uses)

    def _elsewhere(self) -> None:
        """Remarks on weights in bodies and functions, and on sparse constants."""
        for graph, where in graphs(self.model):
            for value, tensor in constants(graph) if where else ():
                if tensor.dtype in FLOATS and _sizeable(tensor) and value.uses():
                    self._remark(value.name, where)
            for node in graph:
                if node.op_type == "Constant" and "sparse_value" in node.attributes:
                    self._remark(node.outputs[0].name, "the weight is sparse")


def find_sites(model: ir.Model) -> tuple[tuple[Match, ...], tuple[Remark, ...]]:
    """All sites of the main graph in topological order, and why other weights were passed over."""
    finder = _Finder(model)
    matches = finder.find()
    return matches, tuple(finder.remarks)


def _turn(node: ir.Node, rank: int) -> bool | None:
    """Whether a node hands a matrix on transposed (True) or as it is (False); None if it does something else."""
    if node.domain != "":
        return None
    if node.op_type == "Identity":
        return False
    if node.op_type == "Transpose" and rank == 2:
        return tuple(node.attributes.get_ints("perm", (1, 0))) == (1, 0)
    return None


def _is_constant(value: ir.Value) -> bool:
    while True:
        node = value.producer()
        if node is None:
            return value.is_initializer() and not value.is_graph_input()
        if node.op_type == "Constant" and node.domain == "":
            return True
        source = node.inputs[0] if node.inputs and node.op_type in ("Identity", "Transpose") else None
        if source is None:
            return False
        value = source


def _sizeable(tensor: ir.TensorProtocol) -> bool:
    """At least two axes longer than one: smaller constants are biases, scales and masks."""
    return sum(int(size) >= 2 for size in tensor.shape.numpy()) >= 2


def _foreign(value: ir.Value, tensor: ir.TensorProtocol) -> str:
    """Why a constant that is not floating is passed over; '' for indices, shapes and masks."""
    readers = [node.op_type for node, _ in value.uses()]
    kind = tensor.dtype.name.lower()
    if any(reader.startswith(_QUANTISED) for reader in readers):
        return f"{readers[0]}: the weight is quantised ({kind})"
    if kind == "string" or kind.startswith(("float", "complex")) or any(r in MATCHERS or r == "Conv" for r in readers):
        return f"the weight has dtype {kind}, not a real floating one"
    return ""


def _tied(roots: list[_Root]) -> Iterator[list[_Root]]:
    """Group matrices of equal entries, stored alike or transposed; the diagonals save most of the hashing."""
    buckets: dict[object, list[_Root]] = defaultdict(list)
    for root in roots:
        shape = tuple(root.tensor.shape.numpy())
        if len(shape) != 2:
            yield [root]
            continue
        diagonal = array(root.tensor).diagonal()
        few = diagonal[:: max(1, len(diagonal) // 64)].tobytes()
        buckets[root.tensor.dtype, tuple(sorted(shape)), few].append(root)
    for bucket in buckets.values():
        if len(bucket) == 1:
            yield bucket
            continue
        groups: dict[frozenset[str], list[_Root]] = defaultdict(list)
        for root in bucket:
            groups[frozenset((root.digest(False), root.digest(True)))].append(root)
        yield from groups.values()


def _one_canonical(group: list[_Root], uses: tuple[Use, ...]) -> bool:
    if len({(use.root, use.flipped) for use in uses}) == 1:
        return True
    roots = {root.value: root for root in group}
    return len({roots[use.root].digest(use.flipped) for use in uses}) == 1


def _numbered(matches: list[Match]) -> tuple[Match, ...]:
    """Give the sites their order, and first names that are unique."""
    count = Counter(match.site.name for match in matches)
    numbered = []
    for k, match in enumerate(matches):
        names = match.site.names
        if count[names[0]] > 1:
            own = match.uses[0].root.name or names[0]
            names = tuple(dict.fromkeys([own, *names]))
        numbered.append(replace(match, site=replace(match.site, order=k, names=names)))
    return tuple(numbered)


def _inferred_ranks(model: ir.Model) -> dict[str, int]:
    from onnx_ir.passes.common import ShapeInferencePass

    copy = model.clone()
    ShapeInferencePass(strict_mode=False, data_prop=False)(copy)
    values = (value for node in copy.graph for value in node.outputs)
    return {value.name or "": value.shape.rank() for value in values if value.shape is not None}

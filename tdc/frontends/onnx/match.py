"""Which constants are weights of sites, and why others are not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import onnx_ir as ir

from ...ir import Decline, Remark, Site, window_attributes
from ..program import passed_over_weight, sketch
from .names import aliases
from .operators import MATCHERS, NEGATIVE_AXES_OPSET, OLDEST_OPSET, Form, opset, sizes_of
from .shapes import Shapes
from .tail import padding_before, tail
from .tensors import FLOATS, constants, graphs
from .ties import Root, difference, tied
from .uses import Match, Use, canonical

__all__ = ["find_sites"]

STAGE = "find-sites"

_QUANTISED = ("DequantizeLinear", "QuantizeLinear", "MatMulInteger", "ConvInteger", "QLinear", "QGemm", "MatMulNBits")
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
        self.shapes = Shapes(model)

    def find(self) -> tuple[Match, ...]:
        roots = [root for root in (self._root(v, t) for v, t in constants(self.graph)) if root is not None]
        matches = []
        for group in tied(roots):
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

    def _root(self, value: ir.Value, tensor: ir.TensorProtocol) -> Root | None:
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
        root = Root(value, tensor)
        self._trace(root, value, False, ())
        return root

    def _trace(self, root: Root, value: ir.Value, turned: bool, chain: tuple[ir.Node, ...]) -> None:
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
            if node.op_type == "Shape" and node.domain == "" and not chain:
                continue  # a number that a replacement keeps
            use = self._use(root, node, operand, turned, chain)
            if isinstance(use, Decline):
                root.refusals.append(use.reason)
            else:
                root.uses.append(use)

    def _use(self, root: Root, node: ir.Node, operand: int, turned: bool, chain: tuple[ir.Node, ...]) -> Use | Decline:
        rank = self._needed_rank(node, operand)
        form = self._form(root, node, operand, rank)
        if isinstance(form, Decline):
            return form
        found = padding_before(node, form) if form.kind.is_conv else None
        pad, sides = found or (None, ())
        if pad is not None:
            pairs = zip(form.windows, sides, strict=True)
            windows = (replace(w, before=w.before + before, after=w.after + after) for w, (before, after) in pairs)
            form = replace(form, windows=tuple(windows))
        return Use(node, form, root.value, chain, turned ^ (not form.stored_oi), rank, pad=pad)

    def _needed_rank(self, node: ir.Node, operand: int) -> int | None:
        """Rank of the activation, looked for only where the matcher or the axes of old opsets need it."""
        if node.op_type != "MatMul":
            return 2 if node.op_type == "Gemm" else None
        other = node.inputs[1 - operand]
        needed = operand == 0 or self.opset < NEGATIVE_AXES_OPSET
        return self.shapes.rank(other) if needed and other is not None else None

    def _form(self, root: Root, node: ir.Node, operand: int, rank: int | None) -> Form | Decline:
        matcher = MATCHERS.get(node.op_type) if node.domain == "" else None
        if matcher is None:
            return Decline(_REASONS.get(node.op_type, f"{node.op_type}: not handled"))
        form = matcher(node, operand, rank, tuple(root.tensor.shape.numpy()))
        if isinstance(form, Decline):
            return form
        if self.opset < OLDEST_OPSET:
            return Decline(f"opset {self.opset} is older than {OLDEST_OPSET}, where operators broadcast in another way")
        other = node.inputs[form.data]
        if other is None or _is_constant(other):
            return Decline(f"{node.op_type}: both operands are constant")
        if not form.kind.is_conv and self.opset < NEGATIVE_AXES_OPSET and rank is None:
            return Decline(f"opset {self.opset} has no negative axes, and the rank of the activation is unknown")
        return form

    def _match(self, group: list[Root], uses: tuple[Use, ...]) -> Match | None:
        first = uses[0]
        names = tuple(dict.fromkeys([*aliases(first.root, first.node), *(root.name for root in group)]))
        refused = [reason for root in group for reason in root.refusals]
        weight = canonical(first.root, first.flipped)
        if refused:
            reason = f"{refused[0]}; its {len(uses)} linear use(s) stay dense with it"
        else:
            reason = difference(group, uses) or passed_over_weight(weight)
        if not reason and not first.form.kind.is_conv and min(weight.shape) < 2:
            reason = f"the weight of shape {list(weight.shape)} has rank 1 already"
        if reason:
            self._remark(names[0], reason)
            return None
        if len(uses) == 1:
            uses = (replace(first, tail=tail(first.node, first.form, first.width, self.shapes.rank)),)
        return Match(self._site(uses, names, FLOATS[group[0].tensor.dtype]), uses)

    def _site(self, uses: tuple[Use, ...], names: tuple[str, ...], dtype: str) -> Site:
        first = uses[0]
        weight, form, norm = first.weight(), first.form, first.tail.norm
        lengths = {self._lengths(use) for use in uses}
        return Site(
            form.kind,
            sizes_of(form, tuple(weight.shape)),
            dtype,
            order=0,
            sketch=sketch(weight),
            names=names,
            uses=len(uses),
            attributes=window_attributes(form.windows) if form.kind.is_conv else (),
            bias=len(uses) == 1 and first.bias is not None,
            norm="" if norm is None else norm.name or norm.outputs[0].name or "",
            lengths=lengths.pop() if len(lengths) == 1 else (),
        )

    def _lengths(self, use: Use) -> tuple[tuple[str, int, int], ...]:
        """(axis, entries, positions) of each window axis, if the file fixes them all."""
        shape = self.shapes.of(use.activation) if use.form.windows else None
        sizes = [size for size in (shape or ())[2:] if size is not None]
        if not sizes or len(sizes) != len(use.form.windows):
            return ()
        return tuple((w.axis, size, w.positions(size)) for w, size in zip(use.form.windows, sizes, strict=True))

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
    if kind == "string" or kind.startswith(("float", "complex")) or any(r in MATCHERS for r in readers):
        return f"the weight has dtype {kind}, not a real floating one"
    return ""


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

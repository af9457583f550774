"""Exported programs: opened as graphs, and exported again after they were rewritten."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from ...errors import CalibrationError, VerificationError
from ..graph import floating_outputs
from .captured import Bound, Captured, Values, undisturbed
from .program import FxProgram
from .rewrite import Rewritten

__all__ = ["export_again", "open_exported"]

_TOLERANCE = 1e-4
"""Greatest difference, relative to the largest output, between the rewritten graph and what export made of it."""


def open_exported(program: ExportedProgram) -> FxProgram:
    """The program as graphs with constants; the program itself stays as it is."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    _merge_equal(module.graph)
    tensors = {}
    for node in module.graph.find_nodes(op="get_attr"):
        held = _attribute(module, str(node.target))
        if isinstance(held, Tensor):
            tensors[node] = held
            node.meta.setdefault("val", held)
    names = {node: (str(node.target),) for node in tensors}
    spec = program.call_spec

    def label(output: Any) -> Mapping[str, Tensor]:
        entries = output if isinstance(output, (tuple, list)) else (output,)
        whole = pytree.tree_unflatten(list(entries), spec.out_spec) if spec.out_spec is not None else output
        return floating_outputs(whole)

    inputs = tuple(node.name for node in module.graph.find_nodes(op="placeholder") if node not in names)
    captured = Captured(module, names, lambda batch: _flat_inputs(program, batch), label, arguments=inputs)
    given = program.example_inputs
    example = None if given is None else (0, tuple(pytree.tree_leaves(given)))
    return FxProgram([Bound(captured, tensors)], example)


def _attribute(module: nn.Module, target: str) -> Any:
    path, _, name = target.rpartition(".")
    return getattr(module.get_submodule(path), name, None)


def _merge_equal(graph: fx.Graph) -> None:
    """One node for every attribute, however often it is read."""
    first: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        kept = first.setdefault(str(node.target), node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)


def _flat_inputs(program: ExportedProgram, batch: Any) -> Values:
    """A tensor is one argument, a mapping keyword arguments, a tuple or list positional ones, those beyond what the
    program takes dropped. Raises CalibrationError.
    """
    spec = program.call_spec.in_spec
    args_spec, kwargs_spec = spec.children() if hasattr(spec, "children") else spec.children_specs
    count = args_spec.num_children
    if not isinstance(batch, (Tensor, Mapping, tuple, list)):
        raise CalibrationError(f"a batch must be a tensor, a tuple or a dict of keywords; got {type(batch).__name__}")
    args = (batch,) if isinstance(batch, Tensor) else () if isinstance(batch, Mapping) else tuple(batch)[:count]
    kwargs = dict(batch) if isinstance(batch, Mapping) else {}
    if isinstance(batch, Mapping) and count:
        names = [node.name for node in program.graph.find_nodes(op="placeholder")][-spec.num_leaves :]
        missing = [name for name in names if name not in kwargs]
        if missing:
            raise CalibrationError(f"the batch lacks {missing}: the program takes {names}")
        return tuple(kwargs[name] for name in names)
    wanted = list(kwargs_spec.context or [])
    if set(wanted) - set(kwargs):
        raise CalibrationError(f"the batch lacks the keywords {sorted(set(wanted) - set(kwargs))}")
    leaves = pytree.tree_leaves((args, {name: kwargs[name] for name in wanted}))
    if len(leaves) != spec.num_leaves:
        raise CalibrationError(f"the program takes {spec.num_leaves} inputs; the batch gives {len(leaves)}")
    return tuple(leaves)


def export_again(program: ExportedProgram, opened: FxProgram, new: Rewritten) -> ExportedProgram:
    """The rewritten graph as a program of its own, with the inputs and dynamic sizes of the old one.

    Raises VerificationError if it cannot be exported, or then gives something else.
    """
    captured = opened.bounds[0].captured
    module = _holding(captured.module, new)
    _part_from(module, {str(node.target) for node in captured.written if node.op == "get_attr"})
    args, kwargs = program.example_inputs or _made_up(program)
    sizes = _dynamic_shapes(program)
    try:
        with torch.no_grad():
            made = torch.export.export(module, args, kwargs, dynamic_shapes=sizes, strict=False)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:300]
        raise VerificationError(f"the program cannot be exported again: {type(error).__name__}: {first}") from error
    writes = bool(captured.written)  # then runs would leave their marks
    runs = [copy.deepcopy(run) if writes else run for run in (module, made.module())]
    expected, found = (_leaves(run, args, kwargs) for run in runs)
    for a, b in zip(expected, found, strict=True):
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
            size, moved = float(a[a.isfinite()].abs().amax()) if a.isfinite().any() else 0.0, _moved(a, b)
            if not moved <= _TOLERANCE * max(size, 1e-30):
                raise VerificationError(f"the exported program differs from the rewritten graph by {moved:.3g}")
    return made


def _leaves(run: Any, args: Any, kwargs: Any) -> list[Any]:
    """What a run gives, of copies of the inputs, with the same random numbers each time."""
    args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
    with undisturbed():
        return pytree.tree_leaves(run(*args, **kwargs))


def _moved(a: Tensor, b: Tensor) -> float:
    """The largest difference of entries; of equal infinities, and of two that are no numbers, 0."""
    alike = (a == b) | (a.isnan() & b.isnan())
    return float((a - b).abs().masked_fill(alike, 0.0).amax())


def _holding(old: fx.GraphModule, new: Rewritten) -> fx.GraphModule:
    """The rewritten graph with its constants as parameters (indices: buffers) at the modules of the old weights."""
    module = new.module
    module.graph.set_codegen(old.graph._codegen)
    placeholders = module.graph.find_nodes(op="placeholder")
    first = next(node for node in module.graph.nodes if node.op != "placeholder")
    for node in placeholders[len(new.kept) :]:
        tensor, target = new.constants[node.name], new.paths[node.name]
        path, _, name = target.rpartition(".")
        owner = _submodule(module, path)
        if tensor.is_floating_point():
            owner.register_parameter(name, nn.Parameter(tensor.detach().clone(), requires_grad=False))
        else:
            owner.register_buffer(name, tensor.detach().clone())
        with module.graph.inserting_before(first):
            node.replace_all_uses_with(module.graph.get_attr(target))
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code(lambda node: node.op != "get_attr")
    module.delete_all_unused_submodules()
    _drop_unread(module)
    module.recompile()
    return module


def _part_from(module: nn.Module, written: Collection[str]) -> None:
    """Buffers that are written to in memory of their own: the old program does not change with the new one."""
    for path, owner in module.named_modules():
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None and (f"{path}.{name}" if path else name) in written:
                owner._buffers[name] = buffer.detach().clone()


def _submodule(module: nn.Module, path: str) -> nn.Module:
    """The submodule at a path, made where nothing is left of it."""
    for name in path.split(".") if path else ():
        if not hasattr(module, name):
            module.add_module(name, nn.Module())
        module = getattr(module, name)
    return module


def _drop_unread(module: fx.GraphModule) -> None:
    read = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    for path, owner in module.named_modules():
        for held in (owner._parameters, owner._buffers):
            for name in list(held):
                if (f"{path}.{name}" if path else name) not in read:
                    del held[name]


def _inputs(program: ExportedProgram) -> list[fx.Node]:
    """The placeholders of the user's inputs, flat."""
    wanted = set(program.graph_signature.user_inputs)
    return [node for node in program.graph.find_nodes(op="placeholder") if node.name in wanted]


def _made_up(program: ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of the right sizes, for a program that was saved without examples."""
    leaves = []
    for node in _inputs(program):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            shape = [int(n.node.hint if isinstance(n, torch.SymInt) else n) for n in value.shape]
            value = torch.zeros(shape, dtype=value.dtype, device=value.device)
        leaves.append(value)
    return pytree.tree_unflatten(leaves, program.call_spec.in_spec)


def _dynamic_shapes(program: ExportedProgram) -> Any:
    """The dynamic sizes of a program's inputs, as ``torch.export.export`` takes them; None if there are none."""
    dims: dict[str, Any] = {}
    leaves: list[Any] = []
    for node in _inputs(program):
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else ()
        dynamic: dict[int, Any] = {axis: n for axis, n in enumerate(sizes) if isinstance(n, torch.SymInt)}
        leaves.append({axis: _dim(n, program, dims) for axis, n in dynamic.items()} or None)
    if not any(leaves):
        return None
    args, kwargs = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    return (*args, *kwargs.values())


def _dim(size: torch.SymInt, program: ExportedProgram, dims: dict[str, Any]) -> Any:
    """One named dimension for every symbol, with its range, or a multiple of it plus a number; what else is computed
    from symbols is found by export.
    """
    symbols = size.node.expr.free_symbols
    symbol = next(iter(symbols), None)
    bounds = program.range_constraints.get(symbol)
    if bounds is None or len(symbols) != 1:
        return Dim.AUTO
    times = size.node.expr.coeff(symbol)
    more = size.node.expr - times * symbol
    if not (times.is_Integer and more.is_Integer and times > 0):
        return Dim.AUTO
    if str(symbol) not in dims:
        low, high = int(bounds.lower), bounds.upper
        most = {"max": int(high)} if getattr(high, "is_Integer", False) else {}  # not infinity
        dims[str(symbol)] = Dim(f"d_{symbol}", min=max(low, 0), **most)
    dim = dims[str(symbol)]
    dim = dim if times == 1 else int(times) * dim
    return dim if more == 0 else dim + int(more)

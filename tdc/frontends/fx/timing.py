"""How long the operators of a graph take on this machine, as they are and as blocks: each by itself, operator by
operator, without what a compiler fuses, or by kernels that the graph would have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ...ir import Block, Site
from ..clock import Run, alike, copies_of, in_turn, part_of_run, seconds_of, stand_ins, stored_numbers
from ..program import Kernel, Replacement
from .captured import Bound, Values, undisturbed
from .emit import Emitter, Kernels
from .match import Use

__all__ = ["Met", "Stopwatch", "met_in"]


@dataclass(frozen=True, eq=False)
class Met:
    """A use, and the arguments that its operator got."""

    use: Use
    args: tuple[Any, ...]

    @property
    def activation(self) -> Tensor:
        given = self.args[self.use.node.args.index(self.use.activation)]
        assert isinstance(given, Tensor)
        return given

    @property
    def weight(self) -> int:
        """The place of the weight among the arguments."""
        others = (self.use.activation, self.use.bias, self.use.rest)
        nodes = [k for k, a in enumerate(self.use.node.args) if isinstance(a, fx.Node) and a not in others]
        return nodes[0]


def met_in(bound: Bound, values: Values, uses: Mapping[int, Sequence[Use]]) -> dict[int, list[Met]]:
    """What the uses of each site meet when the graph runs on these values."""
    met: dict[int, list[Met]] = {}
    taps: dict[fx.Node, list[Callable[[Any], None]]] = {}
    for order, own in uses.items():
        there = met.setdefault(order, [])
        for use in own:
            taps.setdefault(use.node, []).append(lambda args, there=there, use=use: there.append(Met(use, args)))  # type: ignore[misc]
    if taps:
        bound.run(values, taps=taps)
    return met


@dataclass(frozen=True, eq=False)
class Stopwatch:
    """Times a graph, and single operators on arguments that they met in it. ``met``: by ``site.order``; ``kernels``:
    what blocks get where it is faster.
    """

    whole: Run
    sites: Sequence[Site]
    met: Mapping[int, Sequence[Met]]
    kernels: Kernels | None = None

    def model(self) -> tuple[float, float]:
        """Seconds of a run of the whole graph, the fastest, and what part of a run its sites take."""
        kinds = alike(self.sites, self.key)
        inside = [(in_turn([_dense(met, 0)[0] for met in self.met[site.order]]), count) for site, count in kinds]
        with undisturbed():
            return part_of_run(self.whole, inside)

    def key(self, site: Site) -> object:
        """Equal for sites that take the same time."""
        shapes = tuple(
            (str(met.use.node.target), tuple(_shape(a) for a in met.args)) for met in self.met.get(site.order, ())
        )
        return (site.kind, site.sizes, site.attributes, site.dtype, site.layout, shapes)

    def site(self, site: Site, blocks: Sequence[Block], kernels: Sequence[Kernel | None] = ()) -> list[float]:
        """Seconds that a site takes in a run, as it is and in place of it with each block, as the graph would have
        it.
        """
        met = self.met[site.order]
        whole = sum(own[0].args[own[0].weight].nbytes for own in self.met.values() if own)
        replaced = [[_replaced(one, block, whole, self.kernels) for one in met] for block in blocks]
        contestants = [[_dense(one, whole) for one in met], *replaced]
        return seconds_of([[in_turn(runs) for runs in zip(*own, strict=True)] for own in contestants])


def _shape(given: Any) -> object:
    return (tuple(given.shape), given.stride(), given.dtype) if isinstance(given, Tensor) else str(given)


def _dense(met: Met, whole: int) -> list[Run]:
    """The operator with other weights of the same memory format."""
    weight = met.args[met.weight]
    target, kwargs = met.use.node.target, dict(met.use.node.kwargs)
    assert callable(target)
    args = [list(met.args) for _ in range(copies_of(weight.nbytes, whole))]
    for seed, own in enumerate(args):
        made = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        own[met.weight] = torch.empty_like(weight).copy_(made)
    return [partial(target, *own, **kwargs) for own in args]


def _replaced(met: Met, block: Block, whole: int, kernels: Kernels | None) -> list[Run]:
    """A graph of the block alone, with its constants as arguments."""
    like, dtype = met.args[met.weight], met.use.dtype or met.args[met.weight].dtype
    met = _fitting(met, block)
    made = [
        stand_ins(block, dtype, like.device, seed)
        for seed in range(copies_of(stored_numbers(block) * like.element_size(), whole))
    ]
    given = [a for a in met.args if isinstance(a, Tensor)]
    graphs = [_graph(met, Replacement(block, factors, ""), kernels) for factors in made]
    return [partial(module.forward, *given, *constants) for module, constants in graphs]


def _fitting(met: Met, block: Block) -> Met:
    """With as much of activation and bias as the block has inputs and outputs: it may know fewer hidden units."""
    if block.kind.is_conv:
        return met
    sizes, args = dict(block.sizes), list(met.args)
    for node, width in ((met.use.activation, sizes["i"]), (met.use.bias, sizes["o"])):
        for k in (k for k, a in enumerate(met.use.node.args) if a is node and isinstance(args[k], Tensor)):
            args[k] = args[k][..., :width].contiguous() if args[k].shape[-1] > width else args[k]
    return replace(met, args=tuple(args))


def _graph(met: Met, new: Replacement, kernels: Kernels | None) -> tuple[fx.GraphModule, list[Tensor]]:
    graph, constants, last = fx.Graph(), list[Tensor](), list[fx.Node]()
    moved: dict[fx.Node, fx.Node] = {}
    args: list[Any] = []
    for old, given in zip(met.use.node.args, met.args, strict=True):
        if isinstance(given, Tensor):
            last[:] = [graph.placeholder(f"a{len(args)}")]
            last[0].meta["val"] = given
            moved.setdefault(old, last[0])  # type: ignore[arg-type]
        args.append(last[0] if isinstance(given, Tensor) else given)
    assert callable(met.use.node.target)
    node = graph.call_function(met.use.node.target, tuple(args), dict(met.use.node.kwargs))
    graph.output(node)

    def constant(name: str, tensor: Tensor) -> fx.Node:
        with graph.inserting_after(last[0]):
            last[:] = [graph.placeholder(name.replace(".", "_"))]
        constants.append(tensor)
        return last[0]

    use = met.use
    there = replace(
        use,
        node=node,
        activation=moved[use.activation],
        bias=moved.get(use.bias) if use.bias is not None else None,
        rest=moved.get(use.rest) if use.rest is not None else None,
    )
    Emitter(graph, constant, kernels).replace(there, None, new, "timed", "", None)
    return fx.GraphModule(torch.nn.Module(), graph), constants

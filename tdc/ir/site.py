"""Sites: the places of a model where a weight acts linearly and may be replaced."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from .equation import Equation
from .window import Window

__all__ = ["CONVOLUTIONS", "OpKind", "Site", "assign", "same_weight", "window_attributes"]

SKETCH_TOLERANCE = 0.02
"""Greatest difference between two sketches of one weight: rounding to bfloat16 moves an entry by below 0.005."""


class OpKind(Enum):
    """What an operator computes, as an equation of activation (operand 0) and weight (operand 1).

    A convolution is the same product over a sliding-window view of its input: ``b`` stands for example and position,
    ``g`` for the groups, ``o`` and ``i`` for outputs and inputs per group, ``p``, ``q``, ``z`` for the window axes. Its
    channel axis (of the activation as it is stored) is axis 1, that of ``linear`` is the last one.
    """

    LINEAR = "linear"
    CONV1D = "conv1d"
    CONV2D = "conv2d"
    CONV3D = "conv3d"

    @property
    def windows(self) -> tuple[str, ...]:
        """Names of the window axes, in storage order; () for ``linear``."""
        return _WINDOWS[self]

    @property
    def dense(self) -> Equation:
        """The dense equation, e.g. ``b i, o i -> b o``; ``b`` stands for all leading axes of the activation."""
        return _DENSE[self]

    @property
    def is_conv(self) -> bool:
        return self is not OpKind.LINEAR


CONVOLUTIONS = (OpKind.CONV1D, OpKind.CONV2D, OpKind.CONV3D)
_WINDOWS = {OpKind.LINEAR: (), **{kind: ("p", "q", "z")[: k + 1] for k, kind in enumerate(CONVOLUTIONS)}}
_DENSE = {OpKind.LINEAR: Equation.parse("b i, o i -> b o")}
for _kind in CONVOLUTIONS:
    _taps = " ".join(_kind.windows)
    _DENSE[_kind] = Equation.parse(f"b g i {_taps}, (g o) i {_taps} -> b g o")


@dataclass(frozen=True)
class Site:
    """One dense weight in canonical axes, with all its uses.

    ``sizes`` are the axis sizes of the canonical weight, for ``linear`` ``o`` (outputs) and ``i`` (inputs), for
    convolutions ``g`` (groups), ``o`` and ``i`` of each group, and the window axes, whatever the storage order of the
    frontend. ``order`` is the topological place of the first use. ``sketch`` are a few numbers that a transposition and
    a rescaling of rows leave alone; () where the weight is not finite. ``names`` are aliases, the first one is shown;
    they identify nothing. ``uses`` counts the operators that read the weight (tied: > 1). ``attributes`` of a
    convolution: see :func:`window_attributes`. ``pointwise_consumer`` is the order of the one site that reads this
    site's output through elementwise functions only, or None. ``hidden_producers``: the orders of the sites whose
    outputs together, through elementwise functions only, are the input of this one, and go nowhere else; () where it is
    not so. ``bias``: the site has a bias of its own that can take up the mean of an error. ``norm``: name of the
    normalisation behind it that is folded into the weight and the bias.
    ``layout``: memory format of its activations, ``channels_last`` or ''. ``lengths``: (axis, input, output) of each
    window axis on the example, where known.
    """

    kind: OpKind
    sizes: tuple[tuple[str, int], ...]
    dtype: str
    order: int = field(compare=False)
    sketch: tuple[float, ...]
    names: tuple[str, ...] = field(compare=False)
    uses: int = 1
    attributes: tuple[tuple[str, str], ...] = ()
    pointwise_consumer: int | None = field(default=None, compare=False)
    hidden_producers: tuple[int, ...] = field(default=(), compare=False)
    bias: bool = field(default=False, compare=False)
    norm: str = field(default="", compare=False)
    layout: str = field(default="", compare=False)
    lengths: tuple[tuple[str, int, int], ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def axes(self) -> Mapping[str, int]:
        """Axis sizes as a mapping: ``{"o": 384, "i": 1536}``."""
        return MappingProxyType(dict(self.sizes))

    @property
    def params(self) -> int:
        """Numbers in the dense weight."""
        return math.prod(self.kind.dense.inputs[1].shape(self.axes))

    @property
    def tied(self) -> bool:
        return self.uses > 1

    @property
    def windows(self) -> tuple[Window, ...]:
        """Size, stride, dilation and padding of each window axis, from sizes and attributes."""
        return _windows(self.kind, self.sizes, self.attributes)

    @property
    def matrix(self) -> tuple[int, int, int]:
        """(groups, outputs, inputs): the weight as one matrix per group, window axes counted to the inputs."""
        axes = dict(self.sizes)
        groups, outputs = axes.get("g", 1), axes["o"]
        return groups, outputs, self.params // (groups * outputs) if groups * outputs else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; :meth:`from_dict` reads them."""
        return {
            "names": list(self.names),
            "kind": self.kind.value,
            "sizes": dict(self.sizes),
            "attributes": dict(self.attributes),
            "dtype": self.dtype,
            "order": self.order,
            "uses": self.uses,
            "sketch": list(self.sketch),
            **({"bias": True} if self.bias else {}),
            **({"norm": self.norm} if self.norm else {}),
            **({"layout": self.layout} if self.layout else {}),
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Site:
        """Raises KeyError, TypeError or ValueError where ``row`` is not what :meth:`to_dict` gives."""
        names = tuple(str(name) for name in row["names"])
        if not names:
            raise ValueError("a site needs a name")
        site = cls(
            kind=OpKind(row["kind"]),
            sizes=tuple((str(axis), int(size)) for axis, size in row["sizes"].items()),
            dtype=str(row["dtype"]),
            order=int(row["order"]),
            sketch=tuple(float(x) for x in row["sketch"]),
            names=names,
            uses=int(row.get("uses", 1)),
            attributes=tuple((str(k), str(v)) for k, v in row.get("attributes", {}).items()),
            bias=bool(row.get("bias", False)),
            norm=str(row.get("norm", "")),
            layout=str(row.get("layout", "")),
        )
        expected = site.kind.dense.inputs[1].axes
        if set(site.axes) != set(expected):
            raise ValueError(f"a {site.kind.value} site has the sizes {list(expected)}; got {list(site.axes)}")
        site.windows  # noqa: B018  (raises ValueError for attributes that cannot be read)
        return site

    @property
    def label(self) -> str:
        """``linear 384x1536``, ``conv2d 64x32x3x3/2`` (stride 2), ``conv2d 2*8x16x3x3`` (two groups), for tables."""
        sizes = "x".join(str(size) for axis, size in self.sizes if axis != "g")
        groups = self.axes.get("g", 1)
        strides = {window.stride for window in self.windows} - {1}
        step = "/" + ",".join(map(str, sorted(strides))) if strides else ""
        return f"{self.kind.value} {f'{groups}*' if groups > 1 else ''}{sizes}{step}"


def window_attributes(windows: Sequence[Window]) -> tuple[tuple[str, str], ...]:
    """Attributes of a convolution site as text: ``stride "2 2"``, ``dilation "1 1"``, ``padding "1:1 0:1"`` (before and
    after, by axis) or ``padding "upper upper"``.
    """
    pads = [window.auto or f"{window.before}:{window.after}" for window in windows]
    return (
        ("stride", " ".join(str(window.stride) for window in windows)),
        ("dilation", " ".join(str(window.dilation if window.size > 1 else 1) for window in windows)),
        ("padding", " ".join(pads)),
    )


@lru_cache(maxsize=4096)
def _windows(
    kind: OpKind, sizes: tuple[tuple[str, int], ...], attributes: tuple[tuple[str, str], ...]
) -> tuple[Window, ...]:
    if not kind.is_conv:
        return ()
    axes, given = dict(sizes), dict(attributes)
    columns = [given.get(key, "").split() for key in ("stride", "dilation", "padding")]
    if any(len(column) != len(kind.windows) for column in columns):
        raise ValueError(f"a {kind.value} site needs stride, dilation and padding of {len(kind.windows)} axes: {given}")
    made = []
    for axis, stride, dilation, pad in zip(kind.windows, *columns, strict=True):
        auto = pad if pad in ("upper", "lower") else ""
        before, after = (0, 0) if auto else (int(part) for part in pad.split(":"))
        window = Window(axis, axes[axis], int(stride), int(dilation), before, after, auto)
        if min(window.size, window.stride, window.dilation) < 1 or min(before, after) < 0:
            raise ValueError(f"impossible window {window}")
        made.append(window)
    return tuple(made)


def same_weight(a: Site, b: Site) -> bool:
    """True if both describe the same kind of operator on the same weight (shape, attributes and sketch agree)."""
    if (a.kind, a.sizes, a.attributes, len(a.sketch)) != (b.kind, b.sizes, b.attributes, len(b.sketch)):
        return False
    return all(abs(p - q) <= SKETCH_TOLERANCE for p, q in zip(a.sketch, b.sketch, strict=True))


def assign(wanted: Sequence[Site], found: Sequence[Site]) -> list[Site | None]:
    """For each wanted site the one of ``found`` that holds the same weight, or None.

    Several sites with one sketch (equal weights) are paired by name, else in topological order; where a door merged
    equal weights into fewer sites, the last one serves the rest.
    """
    answer: list[Site | None] = []
    taken: dict[int, int] = {}
    for site in wanted:
        fitting = sorted((f for f in found if same_weight(site, f)), key=lambda f: f.order)
        if not fitting or not site.sketch:
            answer.append(None)
            continue
        named = next((f for f in fitting if set(f.names) & set(site.names)), None)
        if named is not None:
            answer.append(named)
            continue
        first = fitting[0].order
        place = min(taken.get(first, 0), len(fitting) - 1)
        taken[first] = place + 1
        answer.append(fitting[place])
    return answer

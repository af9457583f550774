"""Whether calibration has seen enough: fits on one half of the batches, measured on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tdc.decompositions import energy, low_rank
from tdc.frontends.program import Program
from tdc.ir import Metric, Site
from tdc.statistics import Moments, shrunk

__all__ = ["optimism", "split_half"]

_SITES = 8
_ERROR = 0.1


def split_half(program: Program, sites: Sequence[Site], moments: Mapping[int, Moments]) -> dict[int, float]:
    """``site.order`` -> by how much the error of a fit is larger on the half of the batches that it has not seen.

    For the eight sites with the fewest rows per input, where there are at least two batches.
    """
    known = [site for site in sites if moments[site.order].weight is None and moments[site.order].halves() is not None]
    known.sort(key=lambda site: moments[site.order].rows / site.matrix[2])
    found = {}
    for site in known[:_SITES]:
        halves = moments[site.order].halves()
        assert halves is not None
        found[site.order] = optimism(program.weight(site).double(), site, *halves)
    return found


def optimism(weight: Tensor, site: Site, first: Moments, second: Moments) -> float:
    """Error on one half over that on the other, to which the low rank of relative squared error near 0.1 was fitted;
    the mean of both directions.
    """
    ratios = []
    for seen, other in ((first, second), (second, first)):
        own, apart = (_metric(site, half) for half in (seen, other))
        assert own.second_moment is not None
        fitting = Metric("input", shrunk(own.second_moment, seen.rows), own.mean)
        best = low_rank(weight, fitting, site.matrix[0])
        rank = min(int((best.tail > _ERROR).sum()), len(best.tail) - 2)
        rest = weight.reshape(site.matrix) - best.approximation(rank)
        lost = [_relative(rest, weight.reshape(site.matrix), metric) for metric in (own, apart)]
        ratios.append(lost[1] / lost[0] if lost[0] > 0 else 1.0)
    return sum(ratios) / 2


def _metric(site: Site, half: Moments) -> Metric:
    moment, mean = half.total.double() / half.rows, half.sum / half.rows
    if not site.bias:
        return Metric("input", moment)
    moment = moment - mean[:, :, None] * mean[:, None]
    moment.diagonal(dim1=-2, dim2=-1).clamp_(min=0)
    return Metric("input", moment, mean)


def _relative(rest: Tensor, weight: Tensor, metric: Metric) -> float:
    assert metric.second_moment is not None
    lost = torch.einsum("gon,gnm,gom->", rest, metric.second_moment, rest)
    whole = energy(weight, metric)
    return float(lost) / whole if whole > 0 else 0.0

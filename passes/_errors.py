"""What a weight in the place of another one loses."""

from __future__ import annotations

import torch
from torch import Tensor

from tdc import decompositions
from tdc.ir import Candidate, Layout, Metric, Site
from tdc.statistics import SiteStatistics

__all__ = ["optimism", "relative_error"]


def relative_error(weight: Tensor, rebuilt: Tensor, metric: Metric, site: Site) -> float:
    """The metric of ``W - W_hat`` as a fraction of the mean square of ``W x``; 0 if both vanish."""
    whole, part = (decompositions.whitened(w, metric) for w in (weight, rebuilt))
    dense, new = (w.weight.reshape(*site.matrix) for w in (whole, part))
    metric = whole.metric
    if metric.output_moment is not None:
        lost = _projection_error(dense, new, metric.output_moment)
    else:
        product = dense - new
        if metric.second_moment is not None:
            product = product @ metric.second_moment.reshape(-1, dense.shape[2], dense.shape[2])
        lost = max(float((product * (dense - new)).sum()), 0.0)
    energy = decompositions.energy(dense, metric)
    if energy <= 0:
        return 0.0 if lost == 0 else float("inf")
    return lost / energy


def optimism(choice: Candidate, layout: Layout, entry: SiteStatistics | None) -> float:
    """``(N + p) / (N - p)``: by how much the error on other data exceeds that on the N rows of a least-squares fit of p
    coordinates (Hocking 1976), up to a factor of three.
    """
    fitted = decompositions.get(choice.decomposition).fitted(layout)
    if choice.hidden is not None and choice.hidden.axis == "i":
        fitted = choice.hidden.width
    rows = entry.rows if entry is not None else 0
    return (rows + fitted) / (rows - fitted) if rows > 2 * fitted else 3.0


def _projection_error(dense: Tensor, rebuilt: Tensor, moment: Tensor) -> float:
    """``tr((I - A) C (I - A)^T)`` with ``W_hat = A W`` (least squares), C (g, o, o) the moment of ``W x``."""
    gram = dense @ dense.mT
    project = (torch.linalg.pinv(gram, hermitian=True) @ dense @ rebuilt.mT).mT
    rest = torch.eye(dense.shape[1], dtype=dense.dtype) - project
    return max(float((rest @ moment * rest).sum()), 0.0)

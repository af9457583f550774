"""The norm in which an approximation of a weight is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["METRICS", "Metric"]

METRICS = ("weight", "input", "fisher")


@dataclass(frozen=True, eq=False)
class Metric:
    """Squared error of ``D = W - W_hat``, the weight as one matrix (o, n) per group; n = i, times the window taps.

    * ``weight``: ``tr(D D^T)``, the Frobenius norm; behind a normalisation with gain c, ``tr(D diag(c)^2 D^T)``, that
      of the weight with the gain folded in.
    * ``input``: ``tr(D S D^T) = E ||D x||^2``, the mean squared error of the site's output (DRONE, Chen et al. 2021;
      SVD-LLM, Wang et al. 2024), with ``S = E[x x^T]`` over the inputs x: activation rows, or the patches under the
      window. Where the site has a bias, it takes up the mean of the error, ``b_hat = b + D E[x]``, and S is the
      covariance ``E[x x^T] - E[x] E[x]^T``; ``mean`` is ``E[x]`` then, and None otherwise.

    * ``fisher``: ``tr(G D S D^T)``, with ``G = E[g g^T]`` over the gradients g of the loss in the site's outputs,
      damped: the second-order estimate of what the model's outputs change by (K-FAC: Martens and Grosse 2015).

    Relative errors are fractions of the metric's value for ``D = W``, with the mean's part: in ``input`` of
    ``E ||W x||^2 = tr(W S W^T) + ||W mean||^2``.

    ``second_moment``: S, (i, i) for ``linear``, (g, n, n) for convolutions, float64. For very wide inputs it is None,
    and ``output_moment`` (g, o, o) is ``W S W^T`` instead: enough for what projects the outputs, and for nothing else.
    ``gradient``: G, (o, o) for ``linear``, (g, o, o) for convolutions, float64 and positive definite; None for I.
    """

    name: str
    second_moment: Tensor | None = None
    mean: Tensor | None = None
    output_moment: Tensor | None = None
    gradient: Tensor | None = None

"""CP of order four, and its start from trains of coupled CPs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tdc import decompositions
from tdc.decompositions import rebuild
from tdc.decompositions._canonical import canonical
from tdc.decompositions._sensitivity import columns
from tdc.decompositions._trains import split_columns, tensor_train, train_to_factors
from tdc.ir import Metric
from tdc.testing import EXAMPLE_AXES, random_factors, random_metric_of, random_weight_of, relative_error

D = decompositions.get("cp4")
WEIGHT = Metric("weight")
CASES = [("conv2d", "", {"r": 3}), ("conv2d-groups", "", {"r": 3})]


def metric_of(name: str, axes: dict[str, int]) -> Metric:
    return WEIGHT if name == "weight" else random_metric_of(axes)


@pytest.mark.parametrize(("kind", "variant", "ranks"), CASES)
@pytest.mark.parametrize("metric", ["weight", "input"])
def test_a_weight_of_its_own_format_is_found_again(kind: str, variant: str, ranks: dict[str, int], metric: str) -> None:
    axes = dict(EXAMPLE_AXES[kind])
    layout = D.layout(axes, ranks, variant)
    weight = rebuild(random_factors(layout, seed=1), layout)
    found = rebuild(D.fit(weight, layout, metric_of(metric, axes)), layout)
    assert relative_error(weight, found, WEIGHT, axes["g"]) < 1e-6


@pytest.mark.parametrize(("kind", "variant", "ranks"), CASES)
def test_the_fit_in_the_metric_is_better_there_than_that_of_the_weight(
    kind: str, variant: str, ranks: dict[str, int]
) -> None:
    axes = dict(EXAMPLE_AXES[kind])
    weight, norm, layout = random_weight_of(axes), random_metric_of(axes), D.layout(axes, ranks, variant)
    mine, other = (rebuild(D.fit(weight, layout, m), layout) for m in (norm, WEIGHT))
    errors = [relative_error(weight, found, norm, axes["g"]) for found in (mine, other)]
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize(("kind", "variant", "ranks"), CASES)
def test_predictions_fall_along_the_lattice(kind: str, variant: str, ranks: dict[str, int]) -> None:
    axes = dict(EXAMPLE_AXES[kind])
    lattice = D.rank_lattice(axes, 1, variant)
    stated = D.errors(random_weight_of(axes), axes, random_metric_of(axes), lattice, variant)
    assert all(later <= error for error, later in pairwise(stated))
    assert stated[-1] < stated[0]


def outer(factors: list[Tensor]) -> Tensor:
    letters = "abcdef"[: len(factors)]
    return torch.einsum(",".join(f"g{n}r" for n in letters) + f"->g{letters}", *factors)


@pytest.mark.parametrize("sizes", [(6, 3, 3, 5), (6, 3, 4, 2, 5)])
def test_a_train_of_coupled_cps_gives_the_factors_of_an_exact_sum(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    tensor = outer([torch.randn(2, n, 2, generator=generator, dtype=torch.float64) for n in sizes])
    cores = tensor_train(tensor, 2)
    mixing, second, ahead = canonical(cores[1], 2)
    found = outer(train_to_factors(cores, (mixing, second, ahead)))
    assert float((found - tensor).norm() / tensor.norm()) < 1e-5


def test_a_train_of_full_ranks_is_exact() -> None:
    tensor = torch.randn(2, 4, 3, 2, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    first, second, third, last = tensor_train(tensor, 100)
    found = torch.einsum("gxas,gsbt,gtcu,gudy->gabcd", first, second, third, last)
    torch.testing.assert_close(found, tensor, rtol=0, atol=1e-12)


def test_columns_are_split_into_the_nearest_products() -> None:
    generator = torch.Generator().manual_seed(4)
    left, right = (torch.randn(2, n, 5, generator=generator, dtype=torch.float64) for n in (3, 4))
    joined = torch.einsum("gpr,gqr->gpqr", left, right).flatten(1, 2)
    p, q = split_columns(joined, 3)
    torch.testing.assert_close(torch.einsum("gpr,gqr->gpqr", p, q).flatten(1, 2), joined, rtol=0, atol=1e-12)


def test_columns_of_a_term_have_one_norm() -> None:
    axes = dict(EXAMPLE_AXES["conv2d"])
    layout = D.layout(axes, {"r": 4}, "")
    parts = columns(D.fit(random_weight_of(axes), layout, WEIGHT), layout)
    norms = torch.stack([part.norm(dim=1) for part in parts.values()])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms), rtol=1e-12, atol=0)

"""Reduction of an input mode in the metric of the patches, against numpy and against closed forms of special cases."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from tdc.decompositions._modes import ModeFit, fit_modes, mode_curves
from tdc.testing import assert_close

SHAPE = (6, 5, 4)
CASES = [(groups, kind) for groups in (1, 3) for kind in ("data", "singular", "identity")]


def random_problem(
    groups: int = 1, kind: str = "data", *, shape: tuple[int, int, int] = SHAPE, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A random weight and the second moment of correlated patches, or of too few of them, or None."""
    generator = torch.Generator().manual_seed(seed)
    t, a, d = shape
    weight = torch.randn(groups, t, a, d, generator=generator, dtype=torch.float64)
    count = a * d // 3 if kind == "singular" else 3 * a * d
    patches = torch.randn(groups, count, a * d, generator=generator, dtype=torch.float64)
    patches = patches @ torch.randn(groups, a * d, a * d, generator=generator, dtype=torch.float64)
    return weight, None if kind == "identity" else patches.mT @ patches / count


def rebuilt(fit: ModeFit) -> np.ndarray:
    weight = np.einsum("gsrd,gra->gsad", fit.core.numpy(), fit.inner.numpy())
    return weight if fit.outer is None else np.einsum("gts,gsad->gtad", fit.outer.numpy(), weight)


def squared_error(weight: torch.Tensor, second: torch.Tensor | None, other: np.ndarray | float) -> float:
    rest = (weight.numpy() - other).reshape(*weight.shape[:2], -1)
    return float(
        sum(
            np.trace(r @ (np.eye(r.shape[1]) if second is None else second[g].numpy()) @ r.T)
            for g, r in enumerate(rest)
        )
    )


@pytest.mark.parametrize(("groups", "kind"), CASES)
@pytest.mark.parametrize("outputs", [None, 2, 6])
def test_the_error_of_a_fit_is_that_of_its_weight_and_at_most_the_curve(
    groups: int, kind: str, outputs: int | None
) -> None:
    weight, second = random_problem(groups, kind)
    curves = mode_curves(weight, second)
    for rank in range(1, 6):
        fit = fit_modes(weight, second, rank, outputs, curves=curves)
        bound = curves.error(rank) if outputs is None else curves.errors(rank, [outputs])[0]
        assert fit.error == pytest.approx(
            squared_error(weight, second, rebuilt(fit)), rel=1e-9, abs=1e-14 * curves.total
        )
        assert fit.error <= bound + 1e-12 * curves.total
        start = fit_modes(weight, second, rank, outputs, curves=curves, sweeps=0)
        assert start.error == pytest.approx(bound, abs=1e-7 * curves.total)


@pytest.mark.parametrize(("groups", "kind"), CASES)
def test_curves_fall_in_both_ranks_from_the_total_to_zero(groups: int, kind: str) -> None:
    weight, second = random_problem(groups, kind)
    curves = mode_curves(weight, second)
    grid = np.array([curves.errors(r, range(7)) for r in range(6)])
    assert curves.total == pytest.approx(squared_error(weight, second, 0.0), rel=1e-12)
    assert grid.max() == curves.total == pytest.approx(grid[0].min(), rel=1e-7)
    assert grid.min() == grid[5, 6] == curves.error(5) == 0
    assert np.diff(grid, axis=0).max() <= 1e-13 * curves.total
    assert np.diff(grid, axis=1).max() <= 0
    assert curves.errors(5, [99]) == [0]
    assert_close(curves.basis.mT @ curves.basis, torch.eye(5, dtype=torch.float64).expand(groups, 5, 5), 1e-12)


@pytest.mark.parametrize("position", [False, True])
def test_the_start_is_optimal_for_one_position_and_for_a_kronecker_product(position: bool) -> None:
    d = 3 if position else 1
    weight, _ = random_problem(shape=(6, 5, d))
    channel, window = (random_problem(shape=(1, k, 1), seed=k)[1][0].numpy() for k in (5, d))
    second = torch.from_numpy(np.kron(channel, window))[None]
    root = np.linalg.cholesky(channel)
    used = np.einsum("tad,dc,tbc->ab", weight[0].numpy(), window, weight[0].numpy())
    energy = np.linalg.eigvalsh(root.T @ used @ root)
    curves = mode_curves(weight, second)
    for rank in range(1, 5):
        assert curves.error(rank) == pytest.approx(energy[: 5 - rank].sum(), rel=1e-6)


@pytest.mark.parametrize(("groups", "kind"), CASES)
def test_the_factors_are_orthonormal_with_settled_signs(groups: int, kind: str) -> None:
    fit = fit_modes(*random_problem(groups, kind), 3, 4)
    assert fit.outer is not None
    assert (fit.outer.shape, fit.core.shape, fit.inner.shape) == ((groups, 6, 4), (groups, 4, 3, 4), (groups, 3, 5))
    assert_close(fit.outer.mT @ fit.outer, torch.eye(4, dtype=torch.float64).expand(groups, 4, 4), 1e-12)
    assert_close(fit.inner @ fit.inner.mT, torch.eye(3, dtype=torch.float64).expand(groups, 3, 3), 1e-12)
    for vectors, dim in ((fit.outer, 1), (fit.inner, 2)):
        assert torch.equal(vectors.abs().amax(dim), vectors.amax(dim))


@pytest.mark.parametrize(("groups", "kind"), CASES)
@pytest.mark.parametrize("outputs", [None, 6])
def test_full_ranks_are_exact(groups: int, kind: str, outputs: int | None) -> None:
    weight, second = random_problem(groups, kind)
    fit = fit_modes(weight, second, 5, outputs)
    assert np.linalg.norm(rebuilt(fit) - weight.numpy()) <= 1e-13 * np.linalg.norm(weight.numpy())
    assert fit.error <= 1e-26 * squared_error(weight, second, 0.0)


def test_sweeps_improve_the_start_and_the_metric_beats_the_identity() -> None:
    weight, second = random_problem(shape=(16, 12, 9))
    errors = [fit_modes(weight, second, 4, 8, sweeps=k).error for k in range(6)]
    assert all(after <= before for before, after in pairwise(errors))
    assert errors[5] < 0.98 * errors[0]
    fit, plain = fit_modes(weight, second, 4, 8), fit_modes(weight, None, 4, 8)
    assert fit.error < 0.75 * squared_error(weight, second, rebuilt(plain))
    assert squared_error(weight, None, rebuilt(fit)) > plain.error


def test_a_weight_of_low_rank_is_found() -> None:
    weight, second = random_problem(shape=(12, 10, 4))
    small = fit_modes(weight, None, 3, 5)
    low = torch.from_numpy(rebuilt(small))
    fit = fit_modes(low, second, 3, 5)
    assert np.linalg.norm(rebuilt(fit) - low.numpy()) <= 1e-6 * np.linalg.norm(low.numpy())


def test_directions_that_were_never_excited_are_projected_not_zeroed() -> None:
    weight, second = random_problem(kind="singular")
    assert second is not None
    nothing = torch.zeros_like(second)
    for outputs in (None, 3):
        plain, blind = fit_modes(weight, None, 3, outputs, sweeps=0), fit_modes(weight, nothing, 3, outputs)
        assert blind.error == mode_curves(weight, nothing).errors(3, [2])[0] == 0
        assert squared_error(weight, None, rebuilt(blind)) <= plain.error * (1 + 1e-6)
    values, vectors = np.linalg.eigh(second[0].numpy())
    unseen = vectors[:, values < 1e-9 * values.max()]
    flat = rebuilt(fit_modes(weight, second, 4, None))[0].reshape(6, -1)
    before = weight[0].reshape(6, -1).numpy()
    assert np.linalg.norm((flat - before) @ unseen) < 0.7 * np.linalg.norm(before @ unseen)


def test_dead_channels_and_a_rank_below_the_mode_leave_an_orthonormal_basis() -> None:
    weight, second = random_problem(shape=(2, 12, 2))
    assert second is not None
    alive = (torch.arange(24) >= 6).to(torch.float64)
    weight[:, :, 9:] = 0
    second = second * alive * alive[:, None]
    curves = mode_curves(weight, second)
    assert_close(curves.basis.mT @ curves.basis, torch.eye(12, dtype=torch.float64)[None], 1e-12)
    assert curves.error(4) <= 1e-7 * curves.total
    rest = weight.numpy() - rebuilt(fit_modes(weight, second, 9, None))
    assert np.linalg.norm(rest) <= 1e-6 * np.linalg.norm(weight.numpy())


@pytest.mark.parametrize("kind", ["data", "identity"])
@pytest.mark.parametrize("rank", [2, 5])
def test_a_zero_weight_has_a_zero_core(kind: str, rank: int) -> None:
    weight, second = random_problem(3, kind)
    weight = torch.zeros_like(weight)
    assert mode_curves(weight, second).errors(rank, [0, 3]) == [0, 0]
    for outputs in (None, 3):
        fit = fit_modes(weight, second, rank, outputs)
        assert fit.error == 0
        assert not fit.core.any()
        assert torch.isfinite(fit.inner).all()
        assert fit.outer is None or torch.isfinite(fit.outer).all()


@pytest.mark.parametrize("kind", ["data", "singular"])
@pytest.mark.parametrize(
    ("of_weight", "of_second"), [(400, -400), (-400, 400), (400, 0), (-400, 0), (0, 400), (0, -400)]
)
def test_powers_of_two_change_no_bit(kind: str, of_weight: int, of_second: int) -> None:
    weight, second = random_problem(3, kind)
    assert second is not None
    large, metric, unit = weight * 2.0**of_weight, second * 2.0**of_second, 2.0 ** (2 * of_weight + of_second)
    assert mode_curves(large, metric).errors(2, [3]) == [mode_curves(weight, second).errors(2, [3])[0] * unit]
    for rank, outputs in ((2, 3), (3, None), (5, 3)):
        fit, other = fit_modes(weight, second, rank, outputs), fit_modes(large, metric, rank, outputs)
        assert torch.equal(other.core, fit.core * 2.0**of_weight)
        assert torch.equal(other.inner, fit.inner)
        assert math.isclose(other.error, fit.error * unit, rel_tol=1e-15)


def test_both_at_the_same_extreme_leave_finite_factors() -> None:
    weight, second = random_problem()
    assert second is not None
    for power in (1e120, 1e-120):
        fit = fit_modes(weight * power, second * power, 3, 4)
        assert torch.isfinite(fit.core).all()
        assert np.linalg.norm(rebuilt(fit)) > 0.1 * power * float(weight.norm())


@pytest.mark.parametrize("kind", ["data", "identity"])
def test_the_same_input_gives_the_same_bits_and_stays_as_it_was(kind: str) -> None:
    weight, second = random_problem(3, kind)
    copies = weight.clone(), None if second is None else second.clone()
    first, again = fit_modes(weight, second, 3, 4), fit_modes(*copies, 3, 4, curves=mode_curves(*copies))
    assert torch.equal(first.core, again.core)
    assert torch.equal(first.inner, again.inner)
    assert first.error == again.error
    assert torch.equal(weight, copies[0])
    assert second is None or torch.equal(second, copies[1])
    assert {x.dtype for x in (first.core, first.inner, first.outer)} == {torch.float64}


def test_an_indefinite_second_moment_is_refused() -> None:
    weight, second = random_problem()
    assert second is not None
    second[0, :8, 8:16] = second[0, 8:16, :8] = -1e3
    with pytest.raises(ValueError, match="not positive semidefinite"):
        mode_curves(weight, second)


def test_a_second_moment_rounded_to_single_precision_is_fine() -> None:
    weight, second = random_problem(kind="singular")
    assert second is not None
    rounded = second.float().double()
    assert float(torch.linalg.eigvalsh(rounded).min()) < -1e-9 * float(rounded.diagonal(dim1=1, dim2=2).mean())
    fit, curves = fit_modes(weight, rounded, 2, 3), mode_curves(weight, second)
    assert squared_error(weight, second, rebuilt(fit)) == pytest.approx(fit.error, abs=1e-5 * curves.total)
    assert fit.error == pytest.approx(fit_modes(weight, second, 2, 3).error, rel=0.02, abs=1e-5 * curves.total)

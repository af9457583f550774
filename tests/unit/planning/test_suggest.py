"""Ranks from singular values alone."""

from __future__ import annotations

import numpy as np
import pytest

from tdc.planning.suggest import energy, evbmf


def noisy(rows: int, columns: int, rank: int, noise: float) -> list[float]:
    """Singular values of a matrix of that rank, with terms of similar size, and noise."""
    random = np.random.default_rng(rank)
    signal = random.normal(size=(rows, rank)) @ random.normal(size=(rank, columns))
    return list(np.linalg.svd(signal + noise * random.normal(size=(rows, columns)), compute_uv=False))


@pytest.mark.parametrize("sizes", [(120, 200), (200, 120), (150, 150)])
@pytest.mark.parametrize("rank", [10, 40])
def test_evbmf_finds_the_rank_under_noise(sizes: tuple[int, int], rank: int) -> None:
    values = noisy(*sizes, rank, 0.3)
    assert evbmf(values, *sizes) == rank
    assert evbmf(values[::-1], *sizes) == rank
    assert evbmf([1e-9 * value for value in values], *sizes) == rank


def test_evbmf_finds_nothing_in_noise_and_everything_in_exact_low_rank() -> None:
    assert evbmf(noisy(80, 120, 1, 1e6), 80, 120) == 0
    assert evbmf([3.0, 2.0, 1.0] + [0.0] * 37, 40, 90) == 3
    assert evbmf([3.0, 2.0, 1.0], 40, 90) == 3
    assert evbmf([0.0] * 5, 5, 9) == 0


def test_evbmf_takes_no_more_values_than_there_are() -> None:
    with pytest.raises(ValueError, match="4 singular values of a 3 x 9 weight"):
        evbmf([1.0] * 4, 3, 9)


@pytest.mark.parametrize(("keep", "rank"), [(0.5, 1), (0.8, 1), (0.82, 2), (0.95, 2), (0.99, 3), (1.0, 3)])
def test_energy_is_the_least_rank_that_keeps_the_share(keep: float, rank: int) -> None:
    assert energy([4.0, 0.9, 1.7], keep) == rank


def test_energy_of_zeros_is_no_rank_and_shares_are_checked() -> None:
    assert energy([0.0, 0.0]) == 0
    assert energy([1e-200, 1e-201]) == 1
    for keep in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="share"):
            energy([1.0], keep)

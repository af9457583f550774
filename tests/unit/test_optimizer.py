"""Adam in the eigenbasis of the gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tdc.optimizer import RotatedAdam

Maker = Callable[[Any], torch.optim.Optimizer]


def adam(params: Any, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr, betas=(0.9, 0.99))


def quadratic(rows: int, columns: int, steps: int, make: Maker) -> float:
    """How far off a matrix ends after steps towards a target, on inputs that share one large direction."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(rows, columns, generator=generator)
    weight = nn.Parameter(target + 0.1 * torch.randn(rows, columns, generator=generator))
    shared = 5 * torch.randn(columns, generator=generator)
    optimizer = make([weight])
    for _ in range(steps):
        x = torch.randn(64, columns, generator=generator) + shared
        optimizer.zero_grad()
        ((weight - target) @ x.T).square().mean().backward()
        optimizer.step()
    x = torch.randn(4096, columns, generator=generator) + shared
    return float(((weight.detach() - target) @ x.T).square().mean())


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_directions_that_all_inputs_share_do_not_bound_the_rate(shape: tuple[int, int]) -> None:
    best = [
        min(quadratic(*shape, 60, lambda p, r=rate, m=make: m(p, lr=r)) for rate in (3e-3, 1e-2, 3e-2))
        for make in (RotatedAdam, adam)
    ]
    assert best[0] < 0.7 * best[1]


def test_the_shorter_side_is_rotated_whichever_it_is() -> None:
    generator = torch.Generator().manual_seed(1)
    wide = nn.Parameter(torch.randn(3, 7, generator=generator))
    tall = nn.Parameter(wide.detach().T.clone())
    optimizer = RotatedAdam([wide, tall])
    for _ in range(40):
        wide.grad = torch.randn(3, 7, generator=generator)
        tall.grad = wide.grad.T.clone()
        optimizer.step()
    assert torch.equal(wide, tall.T)
    assert optimizer.state[tall]["basis"].shape == (3, 3)


def test_of_vectors_and_wide_matrices_it_is_adam() -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = [(5,), (1, 6), (1025, 1026)]
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = RotatedAdam(ours), adam(theirs)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_a_kept_state_goes_on_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(3)
    p = nn.Parameter(torch.randn(4, 3, 3, 3, generator=generator))
    gradients = torch.randn(50, *p.shape, generator=generator)
    optimizer = RotatedAdam([p])
    for gradient in gradients[:20]:
        p.grad = gradient
        optimizer.step()
    q = nn.Parameter(p.detach().clone())
    other = RotatedAdam([q])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for gradient in gradients[20:]:
        p.grad, q.grad = gradient, gradient
        optimizer.step()
        other.step()
    assert torch.equal(p, q)
    assert set(optimizer.state[p]) == set(RotatedAdam.KEYS)

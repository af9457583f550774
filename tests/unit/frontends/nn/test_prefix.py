"""Runs that begin late give what whole runs give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdc
from tdc.frontends.nn import NnProgram
from tdc.frontends.nn.prefix import Prefix, parts_of
from tdc.frontends.program import Change
from tdc.testing import random_cnn, random_mlp


class Residual(nn.Module):
    """A stack of blocks between two layers; ``inplace``: they write to what they read."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([nn.Sequential(nn.ReLU(inplace), nn.Linear(8, 8)) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Hooked(nn.Module):
    """A hook changes what its first part gives."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])
        self.rows[0].register_forward_hook(lambda module, args, output: output.mul(2))
        self.last = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for row in self.rows:
            x = row(x)
        return self.last(x)


class Looped(nn.Module):
    """One part that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        return self.rows[1](self.rows[0](self.rows[0](x)))


def program_of(model: nn.Module, x: Tensor) -> tuple[NnProgram, tuple[Any, ...], Any]:
    program = NnProgram(model.eval(), (x,))
    sites = program.sites()[0]
    return program, sites, next(iter(program.batches([(x,)])))


def scaled(program: NnProgram, sites: Any) -> list[dict[int, Change]]:
    return [{site.order: Change(program.weight(site) * 0.9, None)} for site in sites]


def same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> bool:
    return all(torch.equal(a[key], b[key]) for a, b in zip(found, expected, strict=True) for key in b)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Residual(), torch.randn(7, 5)),
        (random_mlp((24, 40, 32, 16)), torch.randn(7, 24)),
        (random_cnn(), torch.randn(2, 3, 16, 16)),
    ],
    ids=["blocks", "sequence", "convolutions"],
)
def test_a_change_gives_the_same_bits_by_fewer_runs(model: nn.Module, x: Tensor) -> None:
    program, sites, batch = program_of(model, x)
    runs: list[str] = []
    for module in {module for weight in program._weights for module in weight.modules.values()}:
        forward = module.forward
        module.forward = lambda x, forward=forward: runs.append("") or forward(x)  # type: ignore[func-returns-value, misc]
    changes = scaled(program, sites)
    whole = [program.outputs(batch, change) for change in changes]
    every = len(runs)
    with program.remembering([batch]):
        runs.clear()
        assert same([program.outputs(batch, change) for change in changes], whole)
        assert len(runs) < every
        assert same([program.outputs(batch, change) for change in changes], whole)
    assert not program._prefixes


@pytest.mark.parametrize("model", [Hooked(), Looped()])
def test_parts_with_hooks_or_of_several_runs_give_the_same_too(model: nn.Module) -> None:
    program, sites, batch = program_of(model, torch.randn(4, 6))
    changes = scaled(program, sites)
    whole = [program.outputs(batch, change) for change in changes]
    with program.remembering([batch]):
        assert same([program.outputs(batch, change) for change in changes], whole)


def test_blocks_that_write_to_what_they_read_are_run_whole() -> None:
    program, _, batch = program_of(Residual(inplace=True), torch.randn(4, 5))
    with program.remembering([batch]):
        assert not program._prefixes


def test_the_parts_are_the_innermost_ones_that_follow_each_other() -> None:
    model = Residual()
    assert parts_of(model) == [part for block in model.blocks for part in block]
    assert parts_of(nn.Linear(2, 2)) == []


def test_what_is_written_to_is_forgotten() -> None:
    first, second, third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.Sequential(first, second, third).eval()
    x = torch.randn(3, 4)
    prefix = Prefix.of(model, [third], lambda: {"y": model(x)}, 1 << 20)
    assert prefix is not None
    assert prefix.before([third]) == 2
    assert prefix.before([first, third]) == 0
    with torch.no_grad(), prefix.skipping(2):
        prefix.parts[0][1].add_(1)
    assert not prefix.parts
    with prefix.skipping(2):
        assert torch.equal(model(x), third(second(first(x))))


def test_what_takes_too_much_memory_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    program, _, batch = program_of(random_mlp((24, 40, 32, 16)), torch.randn(7, 24))
    monkeypatch.setattr("tdc.frontends.nn.prefix._BYTES", 7 * 4 * 40)
    with program.remembering([batch]):
        assert not program._prefixes


def test_it_works_in_inference_mode() -> None:
    program, sites, batch = program_of(random_mlp((24, 40, 32, 16)), torch.randn(7, 24))
    changes = scaled(program, sites)
    with torch.inference_mode():
        whole = [program.outputs(batch, change) for change in changes]
        with program.remembering([batch]):
            assert same([program.outputs(batch, change) for change in changes], whole)


def test_calibration_finds_the_same_sensitivities(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = random_mlp((24, 40, 32, 16)), list(torch.randn(400, 24).split(100))
    known = tdc.calibrate(model, batches, progress=False)
    monkeypatch.setattr(Prefix, "of", lambda *args: None)
    assert tdc.calibrate(model, batches, progress=False).digest == known.digest

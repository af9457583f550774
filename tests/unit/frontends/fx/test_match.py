"""Which constants of ATen graphs are sites, in every way to write a product, and what is emitted in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tdc import targets
from tdc.decompositions import get, names
from tdc.frontends.fx import Bound, FxProgram, Rewritten
from tdc.frontends.fx.normalise import normalise
from tdc.frontends.nn import NnProgram
from tdc.ir import Site
from tdc.options import Options
from tdc.passes.base import Unit
from tdc.passes.pipeline import COMPRESSING, Pipeline
from tdc.testing import random_cnn, random_mlp

pytestmark = pytest.mark.usefixtures("dynamo")
X = torch.linspace(-1, 1, 5 * 24).reshape(5, 24).sin()


@pytest.fixture
def dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def opened(model: nn.Module, *args: Tensor) -> tuple[FxProgram, list[Any]]:
    """The graph of a model, and the arguments that Dynamo gives it."""
    seen: list[Any] = []

    def backend(gm: Any, example_inputs: Sequence[Any]) -> Any:
        captured = normalise(gm, example_inputs)
        tensors = {n: e for n, e in zip(captured.placeholders, example_inputs, strict=True) if n in captured.names}
        values = tuple(e for n, e in zip(captured.placeholders, example_inputs, strict=True) if n not in captured.names)
        seen.extend([FxProgram([Bound(captured, tensors)], (0, values)), list(example_inputs)])
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(*args)
    return seen[0], seen[1]


class Holding(nn.Module):
    """Parameters, and a function of them."""

    def __init__(self, function: Callable[..., Tensor], **tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


W, B = torch.randn(16, 24, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, 16)
PRODUCTS: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "linear": (lambda m, x: functional.linear(x, m.w, m.b), W),
    "linear, turned": (lambda m, x: functional.linear(x, m.w.t(), m.b), W.T.contiguous()),
    "matmul": (lambda m, x: x @ m.w, W.T.contiguous()),
    "matmul, T": (lambda m, x: x @ m.w.T, W),
    "matmul, mT": (lambda m, x: x @ m.w.mT, W),
    "matmul, permute": (lambda m, x: x @ m.w.permute(1, 0), W),
    "matmul, transpose": (lambda m, x: x[:, None] @ m.w.transpose(-1, -2), W),
    "twice turned": (lambda m, x: functional.linear(x, m.w.t().transpose(0, 1)), W),
    "mm": (lambda m, x: torch.mm(x, m.w), W.T.contiguous()),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), W.T.contiguous()),
    "addmm of a matrix": (lambda m, x: torch.addmm(x[:, :16], x, m.w), W.T.contiguous()),
    "vector": (lambda m, x: x[0] @ m.w.T, W),
    "half": (lambda m, x: (x.bfloat16() @ m.w.bfloat16().T).float(), W),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_with_a_parameter_is_a_site(name: str) -> None:
    function, weight = PRODUCTS[name]
    model = Holding(function, w=weight, b=B)
    program, args = opened(model, X)
    (site,), _ = program.sites()
    assert (site.name, dict(site.sizes), site.uses) == ("w", {"o": 16, "i": 24}, 1)
    assert torch.equal(program.weight(site), W)
    assert site.bias == (("linear" in name and "twice" not in name) or name == "addmm")
    new = rewritten(program, keep=0.9)
    with torch.no_grad():
        expected = Holding(function, w=model.w.detach(), b=B)(X)
        found = new.module(*new.arguments(args))[0]
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < 0.5


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: m.w @ x.T, "also read by aten.matmul.default in a way that no layer does"),
        (lambda m, x: functional.linear(x, m.w) + m.w.sum(), "also read by aten.sum"),
        (lambda m, x: torch.addmm(m.b, x, m.w.T, alpha=2), "also read by aten.addmm"),
        (lambda m, x: functional.linear(x, m.w) + x[:, :16] @ m.w[:, :16].T, "also read by aten.slice"),
        (lambda m, x: functional.linear(x, m.w) @ m.w, "its uses disagree about which axis is the output"),
    ],
)
def test_what_is_not_linear_is_passed_over_with_a_reason(function: Any, reason: str) -> None:
    program, _ = opened(Holding(function, w=W, b=B), X)
    sites, remarks = program.sites()
    assert sites == ()
    assert any(remark.site == "w" and reason in remark.reason for remark in remarks)


def image(*channels: int) -> Tensor:
    return torch.linspace(-1, 1, 2 * channels[0] * 81).reshape(2, channels[0], 9, 9).sin()


CONVS = {
    "same": (nn.Conv2d(4, 6, (2, 3), padding="same"), image(4)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid", bias=False), image(4)),
    "numbers": (nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2)), image(4)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), image(4)),
    "circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), image(4)),
    "one axis": (nn.Conv1d(4, 6, 3, padding="same", dilation=2), image(4)[:, :, 0]),
    "unbatched": (nn.Conv1d(4, 6, 3, padding=1), image(4)[0, :, 0]),
    "three axes": (nn.Conv3d(4, 6, (1, 2, 3), padding=1), image(4)[:, :, None]),
}


@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_is_the_site_of_the_module_door_and_is_replaced_alike(name: str) -> None:
    conv, x = CONVS[name]
    model = nn.Sequential(conv, nn.ReLU(inplace=True)).eval()
    program, args = opened(model, x)
    ours, theirs = program.sites()[0], NnProgram(model, x).sites()[0]
    assert [everything(site) for site in ours] == [everything(site) for site in theirs]
    new = rewritten(program, keep=0.95)
    small = Pipeline(COMPRESSING).run(unit(NnProgram(model, x), 0.95)).result
    with torch.no_grad():
        assert torch.equal(new.module(*new.arguments(args))[0], small(x))


@pytest.mark.parametrize("make", [random_mlp, random_cnn])
def test_sites_are_those_of_the_module_door(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    x = X if make is random_mlp else torch.randn(2, 3, 16, 16)
    program, _ = opened(model, x)
    ours, theirs = program.sites()[0], NnProgram(model, x).sites()[0]
    assert len(ours) >= 2
    assert [everything(site) for site in ours] == [everything(site) for site in theirs]


def test_a_normalisation_is_folded_only_where_it_alone_reads_a_layer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
            self.norm, self.twice = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.norm(self.a(x)).relu())
            return self.twice(y) + self.twice(self.c(x)) + y

    program, _ = opened(Net().eval(), image(4))
    assert {site.name: site.norm for site in program.sites()[0]} == {"a.weight": "norm", "b.weight": "", "c.weight": ""}
    training = Net()
    training.norm.train()
    found, _ = opened(training, image(4))
    assert all(site.norm == "" for site in found.sites()[0])


def everything(site: Site) -> dict[str, Any]:
    return {field.name: getattr(site, field.name) for field in fields(site)}


def unit(program: Any, keep: float, **options: Any) -> Unit:
    return Unit(program, targets.get("auto"), Options(budget=f"params={keep}", progress=False, **options))


def rewritten(program: FxProgram, keep: float, **options: Any) -> Rewritten:
    return Pipeline(COMPRESSING).run(unit(program, keep, **options)).result


@pytest.mark.parametrize("name", [name for name in names() if not get(name).between_layers])
def test_no_emitted_node_has_only_constant_inputs(name: str) -> None:
    """Else a folder of constants could multiply the factors back."""
    model = nn.Sequential(
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.Flatten(), nn.Linear(588, 40)
    )
    program, _ = opened(model.eval(), image(8))
    new = rewritten(program, 0.97, allow=(name,))
    captured = program.bounds[0].captured
    placeholders = new.module.graph.find_nodes(op="placeholder")
    moving = {placeholders[k] for k, old in enumerate(new.kept) if captured.placeholders[old] in captured.inputs}
    for node in new.module.graph.nodes:
        if node.op == "call_function":
            assert any(argument in moving for argument in node.all_input_nodes), node.format_node()
            moving.add(node)
    assert new.replaced >= 1

"""The kernels are built in a folder of the tests, not in the user's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import Tensor

from tdc import kernels
from tdc.ir import Decline
from tdc.kernels import layers
from tdc.kernels.c import build, two_products
from tdc.kernels.quick import Quick

CACHES = (build.load, two_products.library, two_products._code)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        for cached in CACHES:
            cached.cache_clear()
        two_products.library()
        yield


@pytest.fixture
def compiled() -> None:
    """Skips where the machine cannot compile C."""
    missing = two_products.available()
    if isinstance(missing, Decline):
        pytest.skip(missing.reason)


@pytest.fixture
def gains(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """What the measurement is to find, by the number of rows; nothing is measured."""
    found = {1: 2.0, 4: 1.0, 8: 3.0}
    monkeypatch.setattr(layers, "measured", lambda match, factors, bias, shape, **how: found[shape[0]])
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call that a kernel has run."""
    seen: list[int] = []
    plain = kernels.Match.run

    def run(match: kernels.Match, x: Tensor, factors: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
        seen.append(x.numel() // x.shape[-1])
        return plain(match, x, factors, bias)

    quick = Quick.__call__

    def again(asked: Quick, x: Tensor) -> Tensor | None:
        result = quick(asked, x)
        if result is not None:
            seen.append(x.numel() // x.shape[-1])
        return result

    monkeypatch.setattr(kernels.Match, "run", run)
    monkeypatch.setattr(Quick, "__call__", again)
    return seen

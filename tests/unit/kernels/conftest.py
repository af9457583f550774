"""The kernels are built in a folder of the tests, not in the user's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tdc.ir import Decline
from tdc.kernels.c import build, two_products

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

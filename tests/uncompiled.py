"""MLX without `mx.compile`, for as long as the tests of a module last."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest


@pytest.fixture(scope="module", autouse=True)
def without_compile() -> Iterator[None]:
    """For modules that import it: no mx.compile, which changes no result and costs a compiler run
    for each function and shape."""
    mx.disable_compile()
    yield
    mx.enable_compile()  # other tests of the process look at what is compiled

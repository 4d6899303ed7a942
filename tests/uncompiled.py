"""MLX without `mx.compile`, for as long as a block or a module's tests last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import pytest


@contextmanager
def uncompiled() -> Iterator[None]:
    """No mx.compile: it changes no result and costs a compiler run for each function and shape."""
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()  # other tests of the process look at what is compiled


@pytest.fixture(scope="module", autouse=True)
def without_compile() -> Iterator[None]:
    """For modules that import it."""
    with uncompiled():
        yield

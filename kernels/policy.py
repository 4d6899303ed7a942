"""Which layout, route, kernel and splits serve a call. Everything that is a choice is here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import mlx.core as mx

if TYPE_CHECKING:
    from .pools import Layout

Route = Literal["kernel", "gathered"]


def layout() -> Layout:
    """How pools lie in memory: in pages for the kernels, by head for MLX's CPU back end."""
    return "heads" if mx.default_device() == mx.cpu else "pages"

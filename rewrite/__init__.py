"""mlxrewrite: compile mlx_lm model source into models that run on paged caches.

The compiler (`mlxrewrite.passes`, `mlxrewrite.kinds`) never imports mlx; the names below come from
the runtime and are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["generate", "load", "stream_generate"]

if TYPE_CHECKING:
    from .runtime.generate import generate, stream_generate
    from .runtime.load import load


def __getattr__(name: str) -> Any:
    if name == "load":
        from .runtime.load import load

        return load
    if name in ("generate", "stream_generate"):
        # The function and the module that holds it share a name: import the module by path.
        from importlib import import_module

        return getattr(import_module(".runtime.generate", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

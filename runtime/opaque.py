"""Values that stand for pages or for a mask, and that must never be taken for an array."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import mlx.core as mx


class Opaque:
    """Answers every array operation with a `TypeError` that says which rule was broken.

    MLX asks an unknown operand for `__mlx_array__`, so functions of `mlx.core` that take scalars or
    arrays give the same answer; the others list the types they accept.
    """

    __slots__ = ()
    _rule: ClassVar[str] = "this value is not an array"

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(self._rule)

    __mlx_array__ = __getitem__ = __setitem__ = __iter__ = __len__ = _refuse
    __add__ = __radd__ = __iadd__ = __sub__ = __rsub__ = __isub__ = _refuse
    __mul__ = __rmul__ = __imul__ = __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = _refuse
    __and__ = __rand__ = __or__ = __ror__ = __invert__ = __neg__ = __pow__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        # Only what an array would have answered is misuse; `hasattr` must work for all else.
        if not name.startswith("__") and hasattr(mx.array, name):
            raise TypeError(f"{self._rule} (asked for `.{name}`)")
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

"""Kernels of one text on three back ends: Metal, CUDA (through a prelude), the CPU runner.

The back end is the one of MLX's default device. On the CPU no kernel runs, ops take their plain
form, unless `backend("runner")` asks for the runner, which checks every access and is slow.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import mlx.core as mx

Backend = Literal["metal", "cuda", "runner"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
Dims = tuple[int, int, int]

_asked: ContextVar[Backend | None] = ContextVar("kernel_backend", default=None)
_forms: set[tuple[object, ...]] = set()

# Below this many elements MLX binds an input as `constant`, from it on as `device`.
CONSTANT_BELOW = 8


@contextlib.contextmanager
def backend(name: Backend | None) -> Iterator[None]:
    """Run kernels on this back end inside the block; None: the default device's own."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"back end {name!r}: expected one of {', '.join(BACKENDS)}")
    before = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(before)


def active() -> Backend | None:
    """The back end that kernels run on now; None: none, ops take their plain form."""
    asked = _asked.get()
    if asked is not None:
        return asked
    if mx.default_device() == mx.cpu:
        return None
    return "metal" if mx.metal.is_available() else "cuda"


def builds() -> int:
    """How many compiled forms were asked for so far.

    MLX compiles a kernel anew for other types of its inputs, and where an input crosses
    `CONSTANT_BELOW` elements; serving must stop doing either once it is warm.
    """
    return len(_forms)


@dataclass(frozen=True, slots=True, eq=False)
class MetalKernel:
    """A rendered kernel. Its callable is made once for each back end.

    mutable_inputs: inputs that the kernel writes to, behind the back of MLX's graph; a token must
    order those writes (`pools.Pool`). threadgroup_memory: bytes that CUDA must be asked for, see
    `KernelSpec`.
    """

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str
    mutable_inputs: tuple[str, ...] = ()
    threadgroup_memory: int = 0
    _made: dict[Backend, Callable[..., list[mx.array]]] = field(default_factory=dict, repr=False)

    def __call__(
        self,
        inputs: Mapping[str, mx.array],
        outputs: Sequence[tuple[Sequence[int], mx.Dtype]],
        *,
        groups: Dims | int,
        threads: Dims | int,
        backend: Backend | None = None,
    ) -> list[mx.array]:
        """Run `groups` threadgroups of `threads` threads.

        inputs: one array for each of `input_names`. outputs: shape and dtype of each of
        `output_names`. Grids are whole threadgroups: CUDA rounds up, Metal shortens the last.
        Raises RuntimeError where no back end runs kernels, ValueError for other inputs.
        """
        if set(inputs) != set(self.input_names) or len(outputs) != len(self.output_names):
            raise ValueError(
                f"{self.name}: expected inputs {', '.join(self.input_names)} and "
                f"{len(self.output_names)} outputs, got {', '.join(inputs)} and {len(outputs)}"
            )
        where = backend or active()
        if where is None:
            raise RuntimeError(
                f"{self.name}: kernels run on Metal or CUDA; on the CPU only where "
                'mlxrewrite.kernels.launch.backend("runner") asks for it'
            )
        arrays = [inputs[name] for name in self.input_names]
        dtypes = [dtype for _, dtype in outputs]
        _forms.add((where, self.name, *map(_form, arrays), *dtypes))
        if where not in self._made:
            self._made[where] = self._make(where)
        group, thread = _dims(groups), _dims(threads)
        return self._made[where](
            inputs=arrays,
            grid=tuple(g * t for g, t in zip(group, thread, strict=True)),
            threadgroup=thread,
            output_shapes=[tuple(shape) for shape, _ in outputs],
            output_dtypes=dtypes,
        )

    def _make(self, where: Backend) -> Callable[..., list[mx.array]]:
        words: dict[str, Any] = {
            "name": self.name,
            "input_names": list(self.input_names),
            "output_names": list(self.output_names),
            "source": self.source,
            "header": self.header,
        }
        back: Any = mx.fast
        if where != "metal":
            name = ".dialects.cuda" if where == "cuda" else ".dialects.cpu"
            back = importlib.import_module(name, __package__)
        if self.threadgroup_memory and where == "cuda":
            words["threadgroup_memory"] = self.threadgroup_memory
        if self.mutable_inputs and where == "runner":
            words["mutable_inputs"] = list(self.mutable_inputs)
        made: Callable[..., list[mx.array]] = back.metal_kernel(**words)
        return made


def _dims(size: Dims | int) -> Dims:
    return (size, 1, 1) if isinstance(size, int) else size


def _form(array: mx.array) -> tuple[mx.Dtype, bool, bool]:
    """Scalars, few elements and many are different kernels, as are types."""
    return array.dtype, array.ndim == 0, array.size < CONSTANT_BELOW

"""Kernels on the CPU, through the interface of `mx.fast.metal_kernel`."""

from __future__ import annotations

import ctypes
import math
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from . import symbols
from .errors import CompileError, KernelError
from .source import (
    METAL_TYPES,
    Input,
    Parameter,
    Role,
    Signature,
    TemplateValue,
    cpu_text,
    signature,
)
from .toolchain import kernel_library, runtime_library

Array = npt.NDArray[Any]
Dims = tuple[int, int, int]

MAX_THREADS = 1024
MAX_BUFFERS = 31  # shapes, strides and ranks that a body names count too
THREADGROUP_MEMORY = 32 << 10
MAX_WORKERS = 8
# numpy's stand-in where it has no such type.
NUMPY_TYPES: dict[mx.Dtype, Any] = {
    mx.bool_: np.bool_,
    mx.uint8: np.uint8,
    mx.uint16: np.uint16,
    mx.uint32: np.uint32,
    mx.uint64: np.uint64,
    mx.int8: np.int8,
    mx.int16: np.int16,
    mx.int32: np.int32,
    mx.int64: np.int64,
    mx.float16: np.float16,
    mx.bfloat16: np.uint16,
    mx.float32: np.float32,
}


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("low", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("granule", ctypes.c_uint32),
        ("writable", ctypes.c_uint32),
        ("written", ctypes.c_uint32),
        ("cells", ctypes.c_void_p),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("buffers", ctypes.c_void_p),
        ("image_low", ctypes.c_void_p),
        ("image_high", ctypes.c_void_p),
        ("group_memory", ctypes.c_uint64),
        ("num_buffers", ctypes.c_int),
        ("check", ctypes.c_int),
        ("order", ctypes.c_int),
        ("workers", ctypes.c_int),
        ("lockstep", ctypes.c_int),
        ("grid", ctypes.c_uint32 * 3),
        ("group", ctypes.c_uint32 * 3),
    )


class _Statistics(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("switches", "meetings", "accesses", "group_memory")
    )


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of the latest launch: fibre switches, SIMD-group functions executed, accesses checked, bytes
    of threadgroup memory."""

    switches: int = 0
    meetings: int = 0
    accesses: int = 0
    threadgroup_memory: int = 0


@dataclass(frozen=True, slots=True)
class Options:
    """How to run, besides what the kernel's callable takes.

    order: in which order the threads of a threadgroup take turns: 0 forwards, 1 backwards, any
    other number a shuffle. lockstep: count the lanes of a simdgroup as in step, so that accesses
    on either side of a SIMD-group function are ordered; Metal does not promise that.
    """

    order: int = 0
    lockstep: bool = False
    workers: int = field(default_factory=lambda: min(os.cpu_count() or 1, MAX_WORKERS))
    threadgroup_memory: int = THREADGROUP_MEMORY


@dataclass(frozen=True, slots=True)
class Memory:
    """One buffer of a launch. written: its contents count as such (an output's do not)."""

    name: str
    role: Role
    array: Array
    writable: bool = False
    written: bool = True


@dataclass(frozen=True, slots=True)
class _Library:
    path: Path
    entry: int
    low: int
    high: int
    handle: ctypes.CDLL


_lock = threading.Lock()
_latest = Statistics()


def statistics() -> Statistics:
    """Of the latest launch."""
    return _latest


@cache
def _runtime() -> ctypes.CDLL:
    made = ctypes.CDLL(str(runtime_library()), mode=ctypes.RTLD_GLOBAL)
    made.msl_reserve.restype = ctypes.c_void_p
    made.msl_reserve.argtypes = (ctypes.c_int, ctypes.c_uint64)
    made.msl_release.argtypes = (ctypes.c_int, ctypes.c_uint64)
    made.msl_launch.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p)
    return made


@cache
def _library(path: Path) -> _Library:
    _runtime()
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        raise CompileError(f"the kernel refers to what Metal does not have: {error}") from error
    entry = ctypes.cast(handle.msl_entry, ctypes.c_void_p).value or 0
    low, high = _image(path)
    return _Library(path, entry, low, high, handle)


def _image(path: Path) -> tuple[int, int]:
    """The addresses of a loaded library; (0, 0) where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return 0, 0
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
    if not ranges:
        return 0, 0
    return min(int(low, 16) for low, _ in ranges), max(int(high, 16) for _, high in ranges)


def launch(
    path: Path,
    memories: Sequence[Memory],
    *,
    grid: Sequence[int],
    threadgroup: Sequence[int],
    check: bool,
    options: Options,
) -> None:
    """Run a compiled kernel over its buffers, in the order of its parameters. It runs on copies,
    far apart and aligned as Metal's buffers are; writable arrays are updated at the end.

    Raises KernelError.
    """
    global _latest  # noqa: PLW0603
    library, runtime = _library(path), _runtime()
    text = ctypes.create_string_buffer(1 << 15)
    counted = _Statistics()
    with _lock:
        reserved: list[int] = []
        try:
            addresses = []
            for slot, memory in enumerate(memories):
                address = runtime.msl_reserve(slot, memory.array.nbytes)
                if address is None:
                    raise KernelError(
                        f"buffer '{memory.name}' of {memory.array.nbytes} bytes is too much: the "
                        "runner has room for 64 buffers of 2 GiB each"
                    )
                reserved.append(memory.array.nbytes)
                ctypes.memmove(address, memory.array.ctypes.data, memory.array.nbytes)
                addresses.append(address)
            buffers = (_Buffer * len(memories))(
                *(
                    _Buffer(
                        address,
                        memory.array.nbytes,
                        min(memory.array.itemsize, 4) if memory.writable else 0,
                        memory.writable,
                        memory.written,
                        None,
                    )
                    for address, memory in zip(addresses, memories, strict=True)
                )
            )
            arguments = (ctypes.c_void_p * len(memories))(*addresses)
            request = _Launch(
                library.entry,
                ctypes.addressof(arguments),
                ctypes.addressof(buffers),
                library.low,
                library.high,
                options.threadgroup_memory,
                len(memories),
                check,
                options.order,
                options.workers,
                options.lockstep,
                (ctypes.c_uint32 * 3)(*grid),
                (ctypes.c_uint32 * 3)(*threadgroup),
            )
            errors = runtime.msl_launch(
                ctypes.addressof(request), text, len(text), ctypes.addressof(counted)
            )
            if not errors:
                for address, memory in zip(addresses, memories, strict=True):
                    if memory.writable:
                        ctypes.memmove(memory.array.ctypes.data, address, memory.array.nbytes)
        finally:
            for slot, size in enumerate(reserved):
                runtime.msl_release(slot, size)
    _latest = Statistics(counted.switches, counted.meetings, counted.accesses, counted.group_memory)
    if errors:
        raise KernelError(_readable(text.value.decode(), library, memories))


def _readable(text: str, library: _Library, memories: Sequence[Memory]) -> str:
    def place(match: re.Match[str]) -> str:
        # The address is that of the instruction after a call.
        found = symbols.location(library.path, int(match.group(1), 16) - library.low - 1)
        return f" {found}" if found else ""

    named = re.sub(
        r"buffer (\d+)", lambda match: f"buffer '{memories[int(match.group(1))].name}'", text
    )
    return re.sub(r" @0x([0-9a-f]+)", place, named).strip()


@dataclass(frozen=True, slots=True, eq=False)
class CpuKernel:
    """What `metal_kernel` returns."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str
    ensure_row_contiguous: bool
    atomic_outputs: bool
    mutable_inputs: tuple[str, ...]
    check: bool
    options: Options
    _texts: dict[tuple[Any, ...], tuple[Signature, str]] = field(default_factory=dict, repr=False)

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array | bool | int | float],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        template: Sequence[tuple[str, TemplateValue]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
        check: bool | None = None,
    ) -> list[mx.array]:
        """Run at once (the arrays are evaluated first) and return the outputs.

        Outputs start as NaN, -1 or true, so that an element that is never written shows; with
        init_value, as that. `stream` is ignored. Raises KernelError, ValueError.
        """
        check = self.check if check is None else check
        arrays = self._arrays(inputs)
        size = _dims("grid", grid)
        group: Dims = tuple(  # type: ignore[assignment]
            min(pair) for pair in zip(_dims("threadgroup", threadgroup), size, strict=True)
        )
        if math.prod(group) > MAX_THREADS:
            raise ValueError(
                f"{self.name}: a threadgroup of {math.prod(group)} threads; "
                f"Metal has {MAX_THREADS} at most"
            )
        if len(output_shapes) != len(self.output_names) or len(output_dtypes) != len(
            self.output_names
        ):
            raise ValueError(
                f"{self.name}: expected {len(self.output_names)} output shapes and dtypes, got "
                f"{len(output_shapes)} and {len(output_dtypes)}"
            )
        made, text = self.text(arrays, output_dtypes, template or ())
        if verbose:
            print(f"Generated source code for `{self.name}`:\n```\n{made.text}\n```")
        if len(made.parameters) > MAX_BUFFERS:
            raise ValueError(
                f"{self.name}: {len(made.parameters)} buffers; Metal has {MAX_BUFFERS} at most"
            )
        library = kernel_library(text, check)
        outputs = [
            _fresh(shape, dtype, init_value)
            for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
        ]
        by_name = dict(zip(self.input_names, arrays, strict=True))
        results = dict(zip(self.output_names, outputs, strict=True))
        memories = [
            self._memory(parameter, by_name, results, init_value is not None)
            for parameter in made.parameters
        ]
        launch(library, memories, grid=size, threadgroup=group, check=check, options=self.options)
        return [
            _to_mlx(output, dtype) for output, dtype in zip(outputs, output_dtypes, strict=True)
        ]

    def text(
        self,
        inputs: Sequence[mx.array],
        output_dtypes: Sequence[mx.Dtype],
        template: Sequence[tuple[str, TemplateValue]],
    ) -> tuple[Signature, str]:
        """The kernel function for such inputs, and the C++ made of it."""
        described = tuple(map(Input.of, self.input_names, inputs))
        key = (
            tuple((i.dtype, i.ndim == 0, i.size < 8) for i in described),
            tuple(output_dtypes),
            tuple(template),
        )
        if key not in self._texts:
            made = signature(
                name=self.name,
                inputs=described,
                output_names=self.output_names,
                output_dtypes=output_dtypes,
                source=self.source,
                header=self.header,
                template=template,
                atomic_outputs=self.atomic_outputs,
            )
            self._texts[key] = made, cpu_text(made, self.name)
        return self._texts[key]

    def _arrays(self, inputs: Sequence[mx.array | bool | int | float]) -> list[mx.array]:
        if len(inputs) != len(self.input_names):
            raise ValueError(
                f"{self.name}: expected inputs {', '.join(self.input_names)}, got {len(inputs)}"
            )
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        for name, array in zip(self.input_names, arrays, strict=True):
            if array.dtype not in METAL_TYPES:
                raise ValueError(f"{self.name}: input '{name}' is {array.dtype}; Metal has no such")
        mx.eval(arrays)
        return arrays

    def _memory(
        self,
        parameter: Parameter,
        inputs: dict[str, mx.array],
        outputs: dict[str, Array],
        initialised: bool,
    ) -> Memory:
        name, role = parameter.name, parameter.role
        if role == "output":
            return Memory(name, role, outputs[name], writable=True, written=initialised)
        array = inputs[parameter.array]
        if role == "data":
            mutable = name in self.mutable_inputs
            view = _view(array)
            if not view.flags.c_contiguous:
                if mutable:
                    raise ValueError(
                        f"{self.name}: input '{name}' is written in place and must be contiguous "
                        "in rows"
                    )
                view = np.ascontiguousarray(view)
            return Memory(name, role, view, writable=mutable)
        if role == "shape":
            return Memory(name, role, np.array(array.shape, np.int32))
        if role == "ndim":
            return Memory(name, role, np.array(array.ndim, np.int32))
        strides = [math.prod(array.shape[i + 1 :]) for i in range(array.ndim)]
        return Memory(name, role, np.array(strides, np.int64))


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    *,
    mutable_inputs: Sequence[str] = (),
    check: bool = True,
    options: Options | None = None,
) -> CpuKernel:
    """`mx.fast.metal_kernel` on the CPU: the same text, the same keywords.

    mutable_inputs: inputs that the kernel may write to (it casts `const` away). The write goes
    through to the array's own memory, and so to every array that shares it, as on a GPU.
    check: watch every access; without it several threadgroups run at a time.
    """
    unknown = set(mutable_inputs) - set(input_names)
    if unknown:
        raise ValueError(f"{name}: no inputs {', '.join(sorted(unknown))} to be mutable")
    if not ensure_row_contiguous:
        raise ValueError(f"{name}: the CPU runner has row-contiguous inputs only")
    return CpuKernel(
        name,
        tuple(input_names),
        tuple(output_names),
        source,
        header,
        ensure_row_contiguous,
        atomic_outputs,
        tuple(mutable_inputs),
        check,
        options or Options(),
    )


def _dims(what: str, size: Sequence[int]) -> Dims:
    if len(size) != 3 or min(size) < 1 or max(size) >= 1 << 32:
        raise ValueError(f"{what}: expected three positive numbers, got {tuple(size)}")
    return size[0], size[1], size[2]


def _view(array: mx.array) -> Array:
    """The array's own memory."""
    if array.size == 0:
        return np.empty(array.shape, NUMPY_TYPES[array.dtype])
    stand_in = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.asarray(memoryview(stand_in))  # type: ignore[arg-type]


def _fresh(shape: Sequence[int], dtype: mx.Dtype, init_value: float | None) -> Array:
    made = np.empty(tuple(shape), NUMPY_TYPES[dtype])
    if init_value is None:
        made.reshape(-1).view(np.uint8)[...] = 1 if dtype == mx.bool_ else 0xFF
    else:
        made[...] = _view(mx.full((1,), init_value, dtype))[0]
    return made


def _to_mlx(output: Array, dtype: mx.Dtype) -> mx.array:
    made = mx.array(output)
    return made.view(mx.bfloat16) if dtype == mx.bfloat16 else made

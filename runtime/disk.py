"""Prefixes that left memory, on disk: one file for each block, found by its hash.

A file says what it belongs to (`fingerprint`): one that was put into another's folder is not used.
It is written under another name and moved into place when it is complete, so a process that
dies leaves nothing but a temporary file, which the next one removes. A file that cannot be read, or
whose content is not what its checksum says, is removed and never used.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlxrewrite.kernels.ops import Quantization
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .errors import RuntimeRefusal

PENDING = 64  # blocks that wait to be written; more are given up
SUFFIX = ".safetensors"


@dataclass(slots=True)
class DiskStats:
    """Blocks since the tier was opened."""

    read: int = 0
    written: int = 0
    removed: int = 0  # to keep within the limit
    broken: int = 0
    given_up: int = 0  # not written, since the disk was too slow or full


def fingerprint(
    model: Any,
    block_size: int,
    dtype: mx.Dtype | None,
    quantization: Quantization | None = None,
) -> str:
    """What the content of a block depends on beside its tokens, as far as that can be seen.

    How it is quantised; names, shapes and types of all weights, and the first values of each.
    """
    digest = hashlib.blake2b(digest_size=12)
    digest.update(f"2 {block_size} {dtype} {type(model).__module__}".encode())
    if quantization is not None:
        digest.update(f" {quantization.bits} bits in groups of {quantization.group_size}".encode())
    for name, value in sorted(tree_flatten(model.parameters())):
        digest.update(f"{name} {value.shape} {value.dtype}".encode())
        head = value.reshape(-1)[:16].astype(mx.float32)
        digest.update(np.array(head).tobytes())
    return digest.hexdigest()


class DiskTier:
    """Blocks of one model in `folder`, at most `limit` bytes of them.

    `put` returns at once: a thread writes. What was used longest ago is removed first.
    """

    def __init__(self, folder: str | Path, limit: int, name: str) -> None:
        if limit < 1:
            raise RuntimeRefusal(f"disk cache: expected a limit of at least one byte, got {limit}")
        self.stats = DiskStats()
        self.folder = Path(folder) / name
        self._limit = limit
        self._lock = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sizes = self._found()
        except OSError as problem:
            raise RuntimeRefusal(f"disk cache: {self.folder}: {problem.strerror}") from None
        self._bytes = sum(self._sizes.values())
        self._pending: queue.Queue[tuple[bytes, dict[str, np.ndarray]] | None] = queue.Queue(
            PENDING
        )
        self._waiting: dict[bytes, dict[str, np.ndarray]] = {}
        self._shrink()
        self._thread = threading.Thread(target=self._write_all, daemon=True)
        self._thread.start()

    def __contains__(self, digest: bytes) -> bool:
        with self._lock:
            return digest.hex() in self._sizes or digest in self._waiting

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return self._bytes

    def put(self, digest: bytes, arrays: Mapping[str, mx.array]) -> None:
        """Keep a block. The arrays are evaluated here."""
        if digest in self:
            return
        raw = {name: _bytes_of(array) for name, array in arrays.items()}
        with self._lock:
            self._waiting[digest] = raw
        try:
            self._pending.put_nowait((digest, raw))
        except queue.Full:
            self.stats.given_up += 1
            with self._lock:
                del self._waiting[digest]

    def get(self, digest: bytes) -> dict[str, np.ndarray] | None:
        """A block's arrays as bytes [...], by name; None if it is not there or broken."""
        with self._lock:
            waiting = self._waiting.get(digest)
        if waiting is not None:
            return waiting
        path = self._path(digest.hex())
        try:
            with safe_open(str(path), framework="np") as file:
                meta = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = meta.get("model"), meta.get("block"), meta.get("checksum")
            if about != (self.folder.name, digest.hex(), _checksum(found)):
                raise ValueError("another content than was written")
            os.utime(path)
        except (OSError, ValueError, SafetensorError) as problem:
            with self._lock:
                known = digest.hex() in self._sizes
            if known:
                logging.warning("disk cache: %s is ignored: %s", path, problem)
                self.stats.broken += 1
                self._remove(digest.hex())
            return None
        self.stats.read += 1
        with self._lock:
            if digest.hex() in self._sizes:  # the latest used last
                self._sizes[digest.hex()] = self._sizes.pop(digest.hex())
        return found

    def flush(self) -> None:
        """Wait until everything is written."""
        self._pending.join()

    def close(self) -> None:
        """Write what waits and end the thread."""
        self._pending.put(None)
        self._thread.join()

    # --------------------------------------------------------------- details

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def _found(self) -> dict[str, int]:
        """Files of earlier processes, the one used longest ago first; half-written ones go."""
        files = []
        for path in self.folder.iterdir():
            if path.suffix == ".tmp":
                path.unlink(missing_ok=True)
            elif path.suffix == SUFFIX:
                state = path.stat()
                files.append((state.st_mtime_ns, path.stem, state.st_size))
        return {name: size for _, name, size in sorted(files)}

    def _write_all(self) -> None:
        while True:
            item = self._pending.get()
            try:
                if item is None:
                    return
                self._write(*item)
            except OSError as problem:  # full, gone, not allowed: go on without
                self.stats.given_up += 1
                logging.warning("disk cache: %s: %s", self.folder, problem)
            finally:
                if item is not None:
                    with self._lock:
                        self._waiting.pop(item[0], None)
                self._pending.task_done()

    def _write(self, digest: bytes, arrays: dict[str, np.ndarray]) -> None:
        name = digest.hex()
        about = {"model": self.folder.name, "block": name, "checksum": _checksum(arrays)}
        data = save(arrays, about)
        temporary = self.folder / f"{name}.{os.getpid()}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path(name))
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        with self._lock:
            self._bytes += len(data) - self._sizes.pop(name, 0)
            self._sizes[name] = len(data)
        self.stats.written += 1
        self._shrink()

    def _shrink(self) -> None:
        while True:
            with self._lock:
                if self._bytes <= self._limit or not self._sizes:
                    return
                oldest = next(iter(self._sizes))
            self._remove(oldest)
            self.stats.removed += 1

    def _remove(self, name: str) -> None:
        with self._lock:
            self._bytes -= self._sizes.pop(name, 0)
        with contextlib.suppress(OSError):
            self._path(name).unlink()


def _bytes_of(array: mx.array) -> np.ndarray:
    """The array's bytes, [..., width * itemsize]: numpy has no bfloat16."""
    return np.array(mx.contiguous(array).view(mx.uint8))


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()

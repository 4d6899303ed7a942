"""Where tests for GPUs run: import this before MLX.

MLXREWRITE_BACKEND=metal or cuda asks for them, and fails without such a device; otherwise they run
where MLX's default device is one. On Metal they have not yet been run.
"""

from __future__ import annotations

import os

# MLX's own products of float32 round to tf32 on CUDA unless told not to; it reads this once.
os.environ["MLX_ENABLE_TF32"] = "0"

import pytest
from mlxrewrite.kernels import launch

WANTED = os.environ.get("MLXREWRITE_BACKEND")
HERE = launch.active() if WANTED in (None, "metal", "cuda") else None
if WANTED in ("metal", "cuda") and HERE != WANTED:
    raise RuntimeError(f"MLXREWRITE_BACKEND is {WANTED}, but MLX's default device runs {HERE}")
MARKS = [
    pytest.mark.skipif(HERE is None, reason="needs a Mac or an NVIDIA GPU"),
    *([getattr(pytest.mark, HERE)] if HERE else [pytest.mark.metal, pytest.mark.cuda]),
]

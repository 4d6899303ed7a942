"""The CPU runner: runs the text that Metal would get and checks every access (docs/runner.md)."""

from .errors import CompileError, KernelError, NoCompilerError
from .runner import CpuKernel, Options, Statistics, metal_kernel, statistics

__all__ = [
    "CompileError",
    "CpuKernel",
    "KernelError",
    "NoCompilerError",
    "Options",
    "Statistics",
    "metal_kernel",
    "statistics",
]

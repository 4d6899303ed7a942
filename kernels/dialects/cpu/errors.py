"""What the runner raises."""

from __future__ import annotations


class KernelError(RuntimeError):
    """A kernel does what Metal forbids or leaves undefined; the message says what, and where."""


class CompileError(KernelError):
    """The text of a kernel does not compile."""


class NoCompilerError(RuntimeError):
    """No C++ compiler that the runner can use was found."""

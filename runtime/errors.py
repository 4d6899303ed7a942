"""What the runtime refuses, in one line for a person: what was expected, what came, what to do."""

from __future__ import annotations


class RuntimeRefusal(Exception):
    """The runtime cannot do what was asked. The command line prints it and exits with 2."""


class OutOfBlocks(RuntimeRefusal):
    """A step needs more blocks than are free. Nothing was changed."""


class UnknownSequence(RuntimeRefusal):
    """A sequence that was never added, was freed, or was broken by a failed step."""


class NotGenerated(RuntimeRefusal):
    """No rewritten file, or one that its manifest or the installed source disagrees with."""


class BadModel(RuntimeRefusal):
    """A model folder, a config or weights that cannot be used."""


class UpstreamDifference(UserWarning):
    """The original has two answers and the rewritten model follows one: docs/upstream.md."""

"""Token independence: a proof that a rewritten model computes each row from that row alone."""

from ..ir import Assumption
from .domain import Value
from .interpret import EMBEDS, POSITIONS, POSITIONS_LAST, Failure, Interpreter
from .world import REWRITTEN, Text, World, text_of

__all__ = [
    "EMBEDS",
    "POSITIONS",
    "POSITIONS_LAST",
    "REWRITTEN",
    "Assumption",
    "Failure",
    "Interpreter",
    "Text",
    "Value",
    "World",
    "text_of",
]

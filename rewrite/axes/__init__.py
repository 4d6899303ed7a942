"""Token independence: a proof that a rewritten model computes each row from that row alone."""

from ..ir import Assumption
from .interpret import Failure, Interpreter
from .world import REWRITTEN, Text, World, text_of

__all__ = ["REWRITTEN", "Assumption", "Failure", "Interpreter", "Text", "World", "text_of"]

"""Token independence of a planned file: proved on the text it will have, or why it is not.

The proof runs over the rewritten text, not over the source: edits, redirected imports and siblings
are what they will be when the file runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..axes import REWRITTEN, Failure, Interpreter, Text, World, text_of
from ..ir import Assumption, Diagnostic, Match, ModuleFacts, Plan, Refusal, Source
from .emit import splice
from .parse import ParseError, parse


@dataclass(frozen=True, slots=True)
class Proof:
    """`failure` is None if every step is row by row, given the assumptions."""

    failure: Diagnostic | None
    assumptions: tuple[Assumption, ...]


@dataclass(eq=False, slots=True)
class Proofs:
    """Proves files of one package; what they share is read once.

    `load` gives the facts of a readable module, `planned` the plan of one that is rewritten.
    """

    load: Callable[[str], ModuleFacts | None]
    planned: Callable[[str], Plan | None]
    texts: dict[str, Text | None] = field(default_factory=dict)

    def prove(
        self,
        module: ModuleFacts,
        plan: Plan,
        judgements: Mapping[str, Match | Refusal],
        entry: str = "Model",
    ) -> Proof:
        """In a language model of mlx_vlm (another `entry`) recognised mixers ask for masks, which
        they get for several tokens only: their kind says that both answers mean the same."""
        name = REWRITTEN + module.source.module
        self.texts[name] = self._rewritten(module, plan)
        behind = REWRITTEN if entry != "Model" else ""
        claims = {behind + c: m.kind for c, m in judgements.items() if isinstance(m, Match)}
        interpreter = Interpreter(World(self._read, self.texts), claims)
        failure = interpreter.prove(name, entry)
        assumptions = tuple(Assumption(a.text, a.place) for a in interpreter.assumptions)
        return Proof(_diagnostic(failure) if failure is not None else None, assumptions)

    def _read(self, name: str) -> Text | None:
        if name.startswith(REWRITTEN):
            module = self.load(name.removeprefix(REWRITTEN))
            plan = self.planned(module.source.module) if module is not None else None
            return self._rewritten(module, plan) if module is not None and plan else None
        module = self.load(name)
        return text_of(module.module, module.source) if module is not None else None

    @staticmethod
    def _rewritten(module: ModuleFacts, plan: Plan) -> Text | None:
        source = module.source
        try:
            data = splice(source.data, plan.edits)
            named = Source.of(REWRITTEN + source.module, source.path, data)
            return text_of(parse(named), source, plan.edits)
        except (ValueError, ParseError):
            return None  # verify says so, with a place


def _diagnostic(failure: Failure) -> Diagnostic:
    return Diagnostic(
        failure.slug, failure.message, failure.place, failure.label, failure.nearest, act="source"
    )

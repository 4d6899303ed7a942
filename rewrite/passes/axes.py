"""Token independence of a planned file: proved on the text it will have, or why it is not.

The proof runs over the rewritten text, not over the source: edits, redirected imports and siblings
are what they will be when the file runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from ..axes import (
    EMBEDS,
    POSITIONS,
    POSITIONS_LAST,
    REWRITTEN,
    Failure,
    Interpreter,
    Text,
    Value,
    World,
    text_of,
)
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
        first: Failure | None = None
        for calls, given in _calls(plan):
            interpreter = Interpreter(World(self._read, self.texts), claims)
            failure = interpreter.prove(name, entry, calls)
            if failure is None:
                found = [Assumption(a.text, a.place) for a in interpreter.assumptions]
                return Proof(None, (*given, *found))
            first = first or failure
        assert first is not None
        return Proof(_diagnostic(first), ())

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


Calls = list[dict[str, Value]]
_LAST = Assumption("position ids are stacked behind tokens: [rows][length][3]", None)


def _calls(plan: Plan) -> Iterator[tuple[Calls, tuple[Assumption, ...]]]:
    """What the runtime gives the entry class beside ids and caches, one proof each way.

    A language model inside a larger one gets embeddings in some steps, and explicit position ids in
    all of them if it takes any. How those are stacked the runtime finds out when it loads a model.
    """
    contract = plan.contract
    if contract is None or not contract.positions:
        yield ([{}] if contract is None else [{}, {"inputs_embeds": EMBEDS}]), ()
        return
    for positions, given in ((POSITIONS, ()), (POSITIONS_LAST, (_LAST,))):
        told: dict[str, Value] = {"position_ids": positions}
        yield [told, {**told, "inputs_embeds": EMBEDS}], given


def _diagnostic(failure: Failure) -> Diagnostic:
    return Diagnostic(
        failure.slug, failure.message, failure.place, failure.label, failure.nearest, act="source"
    )

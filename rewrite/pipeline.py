"""The compiler, from source to generated file. Reads as a table of contents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from .batchwise import set_on
from .diagnostics import error
from .ir import ClassFacts, Diagnostic, Emitted, Match, ModuleFacts, Place, Plan, Refusal, Verdict
from .languages import outside, settle
from .match import NOT_FORWARD, place
from .passes.axes import Proof, Proofs
from .passes.classify import classify, classify_class
from .passes.emit import emit
from .passes.facts import absolute_module, facts
from .passes.kept import kept_state
from .passes.parse import ParseError, parse, read_concretely
from .passes.plan import Judgements, plan, verdict
from .passes.verify import verify
from .per_length import ROWS_SITE, SITE
from .program import Program
from .sources import Package, installed_package

# Packages whose modules are read for what they do, wherever they are imported from.
_READ = ("mlx_lm.models.", "mlx_vlm.models.", "mlx_vlm.kernels")
# What these offer is part of the vocabulary of `match`: their text has nothing to add.
_KNOWN = ("mlx_vlm.models.base", "mlx_vlm.models.cache")


@dataclass(frozen=True, slots=True)
class Compiled:
    """The outcome for one module."""

    module: str
    emitted: Emitted | None
    errors: tuple[Diagnostic, ...]
    inputs: tuple[tuple[str, str], ...]  # modules read and their hashes


@dataclass(eq=False)
class Compiler:
    """Compiles modules of one package, one at a time, and remembers what they share."""

    package: Package
    facts: dict[str, ModuleFacts | None] = field(default_factory=dict)
    judgements: dict[str, dict[str, Match | Refusal]] = field(default_factory=dict)
    failures: dict[str, Diagnostic] = field(default_factory=dict)
    settled: dict[str, Verdict] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    drafted: dict[str, dict[str, Verdict]] = field(default_factory=dict)
    drafts: dict[str, Plan] = field(default_factory=dict)  # of language models, before the proof
    proved: dict[str, Proof | None] = field(default_factory=dict)
    linked: dict[str, tuple[Program, Judgements]] = field(default_factory=dict)
    programs: dict[str, Program] = field(default_factory=dict)

    def compile(self, name: str) -> Compiled:
        """One module, with everything it imports from the package."""
        module = self.load(name)
        if module is None:
            return Compiled(name, None, (self.failures[name],), ())
        try:
            read_concretely(module.source)
        except ParseError as problem:
            return Compiled(name, None, (_syntax(problem),), ())
        reached = self.closure(name)
        planned = self.plan(module)
        inputs = tuple(sorted((m.source.module, m.source.sha256) for m in reached))
        try:
            emitted = emit(module, planned, self.package.upstream, inputs)
        except ValueError as problem:
            where = f"{module.source.path}: {problem}"
            return Compiled(name, None, (error("rewritten-twice", where, act="compiler"),), inputs)
        problems = verify(module, planned, emitted)
        return Compiled(name, emitted if not problems else None, problems, inputs)

    def load(self, name: str) -> ModuleFacts | None:
        """Source, syntax and facts of a module; None (and a failure) if it cannot be read."""
        if name not in self.facts:
            self.facts[name] = self._load(name)
        return self.facts[name]

    def _load(self, name: str) -> ModuleFacts | None:
        package = self.package if _inside(name, self.package.name) else installed_package(name)
        try:
            source = package.read(name) if package is not None else None
            if source is None:
                self.failures[name] = error("unreadable", f"{name}: no such module")
                return None
            return facts(parse(source))
        except ParseError as problem:
            self.failures[name] = _syntax(problem)
        except OSError as problem:
            reason = problem.strerror or str(problem)
            self.failures[name] = error("unreadable", f"{name}: {reason}")
        return None

    def closure(self, name: str) -> list[ModuleFacts]:
        """The module and all modules it imports that we read, the module first."""
        found: dict[str, ModuleFacts] = {}
        queue = [name]
        while queue:
            current = queue.pop(0)
            module = self.load(current) if current not in found else None
            if module is None:
                continue
            found[current] = module
            queue += self.imports(module)
        return list(found.values())

    def imports(self, module: ModuleFacts) -> list[str]:
        source = module.source
        names: list[str] = []
        for statement in module.imports:
            if statement.alias is not None:
                candidates = [statement.module]
            else:
                base = absolute_module(statement, source.module, is_package=source.is_package)
                candidates = [base, *(f"{base}.{imported}" for _, imported in statement.names)]
            names += [name for name in candidates if self.is_read(name)]
        return names

    def is_target(self, module: ModuleFacts) -> bool:
        """A module that gets a generated file: a loader can ask it for the entry class."""
        entry = self.package.entry
        return entry in (module.classes if self.package.nested else module.names)

    def is_read(self, name: str) -> bool:
        if name in _KNOWN:
            return False
        if _inside(name, self.package.name):
            return self.package.path_of(name) is not None
        if not name.startswith(_READ):
            return False
        package = installed_package(name)
        return package is not None and package.path_of(name) is not None

    def judge(self, module: ModuleFacts) -> dict[str, Match | Refusal]:
        """What a module's classes are, from it and what it imports, whoever asks."""
        name = module.source.module
        if name not in self.judgements:
            self.judgements[name] = self._judge(self.program(name), module)
        return self.judgements[name]

    def program(self, name: str) -> Program:
        """The module's closure, linked."""
        if name not in self.programs:
            self.programs[name] = Program({m.source.module: m for m in self.closure(name)})
        return self.programs[name]

    def _judge(self, program: Program, module: ModuleFacts) -> dict[str, Match | Refusal]:
        if self.is_target(module):
            found = classify(program, module)
            return without_proof(found) if self.package.nested else found
        if not self.package.nested:
            return {}
        found = without_proof(classify(program, module))  # texts of larger models are not proved
        return {cls: outside(program, cls, judged) for cls, judged in found.items()}

    def judged(self, module: ModuleFacts) -> tuple[Program, Judgements]:
        """The module's closure, linked, and what its classes are."""
        name = module.source.module
        if name not in self.linked:
            program = self.program(name)
            groups = [self.judge(m) for m in program.modules.values()]
            merged = {cls: found for group in groups for cls, found in group.items()}
            self.linked[name] = program, merged
        return self.linked[name]

    def generated(self, modules: Iterable[ModuleFacts]) -> frozenset[str]:
        """Modules that get a generated file."""
        return frozenset(
            m.source.module
            for m in modules
            if self.is_target(m) and _inside(m.source.module, self.package.name)
        )

    def plan(self, module: ModuleFacts) -> Plan:
        """The edits of a module whose mode is settled."""
        name = module.source.module
        if name not in self.plans:
            for reached in self.closure(name) if not self.package.nested else ():
                if self.is_target(reached):
                    self.verdict(reached)  # a file without a proof is judged anew
            self.plans[name] = self._plan(module, *self.judged(module))
        return self.plans[name]

    def _plan(self, module: ModuleFacts, program: Program, judgements: Judgements) -> Plan:
        reached = list(program.modules.values())
        return plan(
            program,
            module,
            judgements,
            self.verdicts(module, program, judgements),
            self.generated(reached),
            in_place=self.package.nested,
        )

    def verdicts(
        self, module: ModuleFacts, program: Program, judgements: Judgements
    ) -> dict[str, Verdict]:
        """The verdicts on all files of a module's program."""
        targets = [m for m in program.modules.values() if self.is_target(m)]
        if not self.package.nested:
            return {m.source.module: self.verdict(m) for m in targets}
        found = self._draft_verdicts(module)
        proved = {
            m.source.module: self.verdict(m)
            for m in targets
            if found[m.source.module].mode == "sites"
        }
        return settle(program, found | proved, judgements)

    def _unproved(self, program: Program, module: ModuleFacts, judgements: Judgements) -> Verdict:
        """The verdict on a file before it is proved, in the program of whoever asks."""
        nested = self.package.nested
        own = verdict(program, module, judgements, self.package.entry, nested=nested)
        if own.mode != "sites" or own.entry is None:
            return own
        classes = list(program.reachable(own.entry).values())
        reasons = [*self._named_here(program, classes)] or [
            *_set_here(program, classes, judgements)
        ]
        return Verdict("model", own.entry, tuple(dict.fromkeys(reasons))) if reasons else own

    def _named_here(self, program: Program, classes: Iterable[ClassFacts]) -> Iterator[Diagnostic]:
        """Classes that are something else with methods that only this program calls: their files
        were judged without them."""
        for cls in classes:
            for owner in program.lineage(cls):
                module = self.load(owner.module)
                if module is None:
                    continue
                alone, judgements = self.judged(module)
                named = alone.unnamed(owner) - program.unnamed(owner) - NOT_FORWARD
                known = judgements.get(owner.qualified)
                if named and not _alike(classify_class(program, owner), known):
                    where = place(program.modules[owner.module].source, owner.syntax.name_span)
                    calls = ", ".join(sorted(named))
                    message = f"`{owner.name}` is another mixer with what only others call: {calls}"
                    yield Diagnostic("sibling", message, where)

    def verdict(self, module: ModuleFacts) -> Verdict:
        """How a file is run: token-major only if its rewritten text is proved row by row."""
        name = module.source.module
        if self.package.nested:
            return self._nested_verdict(module)
        if name not in self.settled:
            program, judgements = self.judged(module)
            found = self._unproved(program, module, judgements)
            self.settled[name] = found  # for a circle of imports
            reasons, assumptions = found.reasons, found.assumptions
            if found.mode == "sites":
                proof = self._proof(module)
                reasons = (proof.failure,) if proof.failure is not None else ()
                assumptions = proof.assumptions
            if found.entry is not None and reasons:
                reasons = (*reasons, *kept_state(program, found.entry))
                self.settled[name] = Verdict("model", found.entry, reasons)
            else:
                self.settled[name] = Verdict(found.mode, found.entry, reasons, assumptions)
        return self.settled[name]

    def _proof(self, module: ModuleFacts) -> Proof:
        """A proof of the file's text, with its classes as they may be without one if need be."""
        program, judgements = self.judged(module)
        proof = self.proofs.prove(module, self._plan(module, program, judgements), judgements)
        name = module.source.module
        own = self.judgements[name]
        if proof.failure is None or (other := without_proof(own)) == own:
            return proof
        self.judgements[name] = other
        self.linked.clear()
        program, judgements = self.judged(module)
        return self.proofs.prove(module, self._plan(module, program, judgements), judgements)

    def _nested_verdict(self, module: ModuleFacts) -> Verdict:
        """As `verdict`, of a language model inside a larger one."""
        name = module.source.module
        if name not in self.settled:
            found = self._draft_verdicts(module)[name]
            proof = self.language_proof(name) if found.mode == "sites" else None
            if proof is not None and proof.failure is not None:
                found = Verdict("model", found.entry, (proof.failure,))
            elif proof is not None:
                found = Verdict(found.mode, found.entry, found.reasons, proof.assumptions)
            self.settled[name] = found
        return self.settled[name]

    def _draft_verdicts(self, module: ModuleFacts) -> dict[str, Verdict]:
        """Verdicts on the files of a language model's program before any of them is proved."""
        name = module.source.module
        if name not in self.drafted:
            program, judgements = self.judged(module)
            targets = [m for m in program.modules.values() if self.is_target(m)]
            found = {m.source.module: self._unproved(program, m, judgements) for m in targets}
            self.drafted[name] = settle(program, found, judgements)
        return self.drafted[name]

    def draft(self, module: ModuleFacts) -> Plan:
        """The edits that a proof of a language model's file is about."""
        name = module.source.module
        if name not in self.drafts:
            program, judgements = self.judged(module)
            reached = self.generated(program.modules.values())
            drafted = self._draft_verdicts(module)
            self.drafts[name] = plan(program, module, judgements, drafted, reached, in_place=True)
        return self.drafts[name]

    def language_proof(self, name: str) -> Proof | None:
        """The proof of a language model inside a larger one; None if it has no rows to prove."""
        if name not in self.proved:
            module = self.load(name)
            drafted = self.draft(module) if module is not None else None
            self.proved[name] = None
            if module is not None and drafted is not None:
                if drafted.route not in ("none", "model", "refused"):
                    judgements = self.judged(module)[1]
                    entry = self.package.entry
                    self.proved[name] = self.proofs.prove(module, drafted, judgements, entry)
        return self.proved[name]

    @cached_property
    def proofs(self) -> Proofs:
        def planned(name: str) -> Plan | None:
            module = self.load(name)
            if module is None or not self.is_target(module):
                return None
            return self.draft(module) if self.package.nested else self.plan(module)

        return Proofs(lambda name: self.load(name) if self.is_read(name) else None, planned)


def _set_here(
    program: Program, classes: Iterable[ClassFacts], judgements: Judgements
) -> Iterator[Diagnostic]:
    """Where a file sets parts of a mixer that was proved, in another file, as it is made there."""
    for cls in classes:
        judged = judgements.get(cls.qualified)
        if isinstance(judged, Match) and any(
            site.rule in (SITE, ROWS_SITE) for site in judged.sites
        ):
            for module, name, span in set_on(program, cls):
                what = f"`.{name}`" if name != "*" else "an attribute"
                message = f"{what} of `{cls.name}` is set here, which it was proved without"
                yield Diagnostic("sibling", message, place(module.source, span))


def _syntax(problem: ParseError) -> Diagnostic:
    line = problem.source.line_text(problem.line)
    column = problem.column
    where = Place(problem.source.path, problem.line, column, column + 1, line)
    return error("syntax", problem.message, where)


def _alike(one: Match | Refusal | None, two: Match | Refusal | None) -> bool:
    """Two judgements of a class that rewrite the same places, or none."""
    if not isinstance(one, Match) or not isinstance(two, Match):
        return type(one) is type(two)
    forms = [form for form in (one, one.otherwise) if isinstance(form, Match)]
    return any(form.kind == two.kind and form.sites == two.sites for form in forms)


def without_proof(found: dict[str, Match | Refusal]) -> dict[str, Match | Refusal]:
    """Judgements that need no proof of the rest of their file."""
    return {
        cls: judged.otherwise if isinstance(judged, Match) and judged.otherwise else judged
        for cls, judged in found.items()
    }


def _inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")

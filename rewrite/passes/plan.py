"""From judgements to edits: the route of a file, and every byte that changes in it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from ..drivers import driver_edits
from ..edits import decorate, insert, replace, site_comment
from ..heads import last_rows_edit
from ..ir import (
    ClassFacts,
    Diagnostic,
    Edit,
    Import,
    Match,
    Method,
    ModuleFacts,
    Plan,
    Refusal,
    Verdict,
)
from ..languages import contract, language_reasons, shared_state, stores_beside, unsuitable
from ..match import place
from ..outliving import outliving, outliving_around, outliving_in, patches
from ..program import Program
from ..sources import MODEL
from .facts import absolute_module

Judgements = Mapping[str, Match | Refusal]

_CACHE_MODULES = ("mlx_lm.models.cache", "mlx_vlm.models.cache")
# Cache classes that the runtime has specs for.
CACHES = frozenset(
    f"{module}.{name}"
    for module in _CACHE_MODULES
    for name in (
        "KVCache",
        "RotatingKVCache",
        "ChunkedKVCache",
        "ConcatenateKVCache",
        "ArraysCache",
        "CacheList",
    )
)
_RUNTIME_CACHES = "mlxrewrite.runtime.caches"
_SITES = "mlxrewrite.runtime.sites"
_HOMES = {  # where the runtime's names are, if not among the sites
    "initialize_rope": "mlxrewrite.runtime.rope",
    "on_rows": "mlxrewrite.runtime.row_states",
    "per_length": "mlxrewrite.runtime.per_length",
    "convolve": "mlxrewrite.runtime.recurrences",
    "delta_rule": "mlxrewrite.runtime.recurrences",
    "diagonal_scan": "mlxrewrite.runtime.recurrences",
    "last_of_sequences": "mlxrewrite.runtime.row_states",
    "lightning_scan": "mlxrewrite.runtime.recurrences",
    "low_rank_scan": "mlxrewrite.runtime.recurrences",
    "keep_last_rows": "mlxrewrite.runtime.previous",
    "previous_rows": "mlxrewrite.runtime.previous",
    "paged_latent_attention": "mlxrewrite.runtime.latents",
    "paged_top_positions": "mlxrewrite.runtime.rankings",
    "selective_scan": "mlxrewrite.runtime.recurrences",
    "shifted_rows": "mlxrewrite.runtime.row_states",
    "state_space_dual": "mlxrewrite.runtime.recurrences",
    "window_state": "mlxrewrite.runtime.row_states",
    "windows": "mlxrewrite.runtime.row_states",
}
_WORST = ("kernel", "gathered", "per-sequence")


def verdict(
    program: Program,
    module: ModuleFacts,
    judgements: Judgements,
    entry_name: str = MODEL,
    *,
    nested: bool = False,
) -> Verdict:
    """Decide the mode of a file from everything its entry class is built from."""
    entry = entry_class(program, module, entry_name)
    if entry is None:
        return Verdict("none", None, ())
    if nested and (told := unsuitable(program, entry)) is not None:
        return Verdict("none", None, told)
    reasons: list[Diagnostic] = []
    reachable = program.reachable(entry)
    own = {cls.qualified: cls for cls in module.classes.values()}
    for name in {**reachable, **own}:
        judged = judgements.get(name)
        if isinstance(judged, Refusal):
            reasons += judged.diagnostics
    for cls in {**reachable, **own}.values():
        reasons += _foreign_caches(program, cls)
    for read in program.modules.values():
        reasons += patches(read)
    if nested:
        reasons += language_reasons(program, entry, judgements)
    return Verdict("model" if reasons else "sites", entry, tuple(_unique(reasons)))


def entry_class(program: Program, module: ModuleFacts, name: str = MODEL) -> ClassFacts | None:
    """The class that a loader asks a module for, wherever it is defined."""
    bound = module.names.get(name)
    return program.class_of(bound.data) if bound is not None else None


def plan(
    program: Program,
    module: ModuleFacts,
    judgements: Judgements,
    verdicts: Mapping[str, Verdict],
    targets: Collection[str],
    *,
    in_place: bool = False,
) -> Plan:
    """All edits of one file. `targets` are the modules that get a generated file.

    With `in_place` a model that runs whole stays as it is: the runtime calls the original.
    """
    name = module.source.module
    own = verdicts.get(name, Verdict("none", None, ()))
    matches = [
        judged
        for cls in module.classes.values()
        if isinstance(judged := judgements.get(cls.qualified), Match)
    ]
    refusals = [
        judged
        for cls in module.classes.values()
        if isinstance(judged := judgements.get(cls.qualified), Refusal)
    ]
    if own.mode == "none":
        return Plan(name, "none", (), tuple(refusals), own.reasons, ())
    kept = _kept_state(program, own, matches)
    if in_place:
        kept = shared_state(kept)
    beside = tuple(stores_beside(program, own.entry)) if in_place and own.entry is not None else ()
    if kept or beside:
        owner = own.entry.qualified if own.entry is not None else name
        refusal = Refusal(owner, (*kept, *beside))
        return Plan(name, "refused", (), (*refusals, refusal), (*own.reasons, *beside), ())
    facts = contract(program, own.entry) if in_place and own.entry is not None else None
    if own.mode == "model" and in_place:
        return Plan(name, "model", (), tuple(refusals), own.reasons, (), facts)
    if own.mode == "model":
        return _whole_model_plan(program, module, own, refusals, verdicts, targets)
    edits = _edits_of(matches)
    drivers = driver_edits(program, module, _undriven_classes(matches))
    edits += drivers.edits
    rows = last_rows_edit(program, module, own.entry) if own.entry is not None else None
    names = {item for match in matches for item in match.imports} | set(drivers.imports)
    if rows is not None:
        edits.append(rows)
        names.add("last_rows")
    edits += _import_edits(program, module, targets, verdicts, paged=True)
    edits += _new_imports(module, names)
    route = _route(program, own, judgements)
    return Plan(
        name,
        route,
        tuple(matches),
        tuple(refusals),
        drivers.notes,
        _sorted(edits),
        facts,
        own.assumptions,
    )


def _edits_of(matches: Iterable[Match]) -> list[Edit]:
    """The edits of all classes. A function that several share is rewritten once."""
    found: list[Edit] = []
    for match in matches:
        known = frozenset(found)
        found += [edit for edit in match.edits if edit not in known]
    return found


def _whole_model_plan(
    program: Program,
    module: ModuleFacts,
    own: Verdict,
    refusals: list[Refusal],
    verdicts: Mapping[str, Verdict],
    targets: Collection[str],
) -> Plan:
    """The original text; the entry's forward runs once per sequence."""
    name = module.source.module
    notes = tuple(own.reasons)
    entry = own.entry
    assert entry is not None
    kept = tuple(reason for reason in own.reasons if reason.slug == "state-on-self")
    if kept:
        return Plan(name, "refused", (), (*refusals, Refusal(entry.qualified, kept)), notes, ())
    edits = _import_edits(program, module, targets, verdicts, paged=False)
    forward = entry.methods.get("__call__") if entry.module == name else None
    wrapped = forward or (None if entry.module != name else _original_forward(program, entry))
    if wrapped is not None and (wrapped.function.decorators or entry.syntax.decorators):
        known = entry.syntax if forward is None else forward.function
        where = place(module.source, known.name_span)
        message = f"`{entry.name}.__call__` is decorated: what runs once per sequence is not all"
        refusal = Refusal(entry.qualified, (Diagnostic("patched", message, where, act="source"),))
        return Plan(name, "refused", (), (*refusals, refusal), notes, ())
    if forward is not None:
        source = module.source
        text = "the whole model runs once per sequence, over that sequence's own caches"
        edits.append(site_comment(source, forward.function.span, text, "per_sequence_model"))
        edits.append(decorate(source, forward, "per_sequence_model", "per_sequence_model"))
        edits += _new_imports(module, {"per_sequence_model"})
    elif (
        wrapped is not None
        and _as_written(wrapped, name, verdicts)
        and (at := _line(module, entry))
    ):
        base = module.source.text(entry.syntax.bases[0].span)
        indent = module.source.indent(at)
        line = f"{indent}__call__ = per_sequence_model({base}.__call__)\n"
        text = f"{indent}# mlxrewrite: the whole model runs once per sequence\n"
        edits.append(insert(module.source.line_start(at), text + line, "per_sequence_model"))
        edits += _new_imports(module, {"per_sequence_model"})
    elif _runs_at_once(program, entry, name, verdicts):
        where = place(module.source, entry.syntax.name_span)
        message = f"`{entry.name}` has no forward method that can be told to run once per sequence"
        refusal = Refusal(entry.qualified, (Diagnostic("sibling", message, where),))
        return Plan(name, "refused", (), (*refusals, refusal), notes, ())
    return Plan(name, "model", (), tuple(refusals), notes, _sorted(edits))


def _original_forward(program: Program, entry: ClassFacts) -> Method | None:
    """The forward method that the entry has from its only base, if that is a name."""
    found = program.method(entry, "__call__")
    plain = len(entry.syntax.bases) == 1 and entry.syntax.bases[0].op in ("name", "attr")
    return found[1] if found is not None and plain else None


def _as_written(forward: Method, name: str, verdicts: Mapping[str, Verdict]) -> bool:
    """The inherited method is the author's own: of this file, or of one that is not rewritten."""
    home = (forward.owner or "").rpartition(".")[0]
    return home == name or home not in verdicts


def _line(module: ModuleFacts, entry: ClassFacts) -> int | None:
    """Where the last statement of the class begins, if it has a line of its own."""
    start = entry.syntax.body[-1].span.start
    source = module.source
    own = not source.data[source.line_start(start) : start].strip()
    return start if own else None


def _kept_state(program: Program, own: Verdict, matches: Iterable[Match]) -> tuple[Diagnostic, ...]:
    """State outside caches, where original code runs for one sequence after another."""
    changed = [d for d in own.reasons if d.slug == "patched"]
    if (
        changed
    ):  # the class that would be told to run once per sequence may not be the one that runs
        return tuple(_unique(changed))
    if own.mode == "model":
        modules = [m for name, m in program.modules.items() if name not in _CACHE_MODULES]
        found = list(outliving(program, modules))
    else:
        classes = [program.class_of(name) for name in sorted(_undriven_classes(matches))]
        built = [part for cls in classes if cls for part in program.reachable(cls).values()]
        found = [d for cls in built for d in outliving_in(program, cls)]
        found += [d for cls in built for d in outliving_around(program, cls)]
    return tuple(_unique(found))


def _runs_at_once(
    program: Program, entry: ClassFacts, name: str, verdicts: Mapping[str, Verdict]
) -> bool:
    """Nothing here, nor in the file it comes from, makes the forward run once per sequence."""
    found = program.method(entry, "__call__")
    if found is None or found[0].module == name:
        return entry.module == name
    other = verdicts.get(found[0].module)
    return other is None or other.mode != "model"


def _route(program: Program, own: Verdict, judgements: Judgements) -> str:
    """The worst route among the classes the entry is built from."""
    assert own.entry is not None
    routes = {
        judged.route
        for name in program.reachable(own.entry)
        if isinstance(judged := judgements.get(name), Match)
    }
    return max(routes, key=_WORST.index) if routes else "none"


def _undriven_classes(matches: Iterable[Match]) -> frozenset[str]:
    """Classes whose methods stay as they are: the runtime hands them what they expect."""
    whole = {"per_sequence", "per_length", "on_rows"}
    return frozenset(m.class_name for m in matches if whole & {site.rule for site in m.sites})


def _foreign_caches(program: Program, cls: ClassFacts) -> Iterable[Diagnostic]:
    """Caches made by a `make_cache` of the class that the runtime has no spec for."""
    method = cls.methods.get("make_cache")
    if method is None:
        return
    for effect in method.calls():
        callee = effect.value.args[0]
        if callee.op != "global":
            continue
        name = program.resolve(callee.data)
        known = name in CACHES or name.startswith("builtins.")
        if not known and (program.class_of(name) is not None):
            where = place(program.modules[cls.module].source, effect.value.span)
            message = f"make_cache makes a `{name.rsplit('.', 1)[-1]}`"
            yield Diagnostic("cache-class", message, where, "the runtime has no spec for it")


# --------------------------------------------------------------------------- imports


def _import_edits(
    program: Program,
    module: ModuleFacts,
    targets: Collection[str],
    verdicts: Mapping[str, Verdict],
    *,
    paged: bool,
) -> list[Edit]:
    """Relative imports name what they mean: a generated sibling, or the upstream module."""
    source = module.source
    edits: list[Edit] = []
    for statement in module.imports:
        if statement.alias is not None:
            continue
        base = absolute_module(statement, source.module, is_package=source.is_package)
        if base in _CACHE_MODULES:
            known = all(f"{base}.{imported}" in CACHES for _, imported in statement.names)
            new = _RUNTIME_CACHES if paged and known else base
            if new != source.text(statement.module_span):
                edits.append(replace(source, statement.module_span, new, "import"))
            continue
        if statement.level and not statement.module:
            edits += _from_package(statement, module, base, targets)
            continue
        if base in targets and _redirects(verdicts, base, paged):
            if not statement.level:
                relative = _relative(source.module, base)
                edits.append(replace(source, statement.module_span, relative, "import"))
            continue
        if statement.level:
            edits.append(replace(source, statement.module_span, base, "import"))
    return edits


def _redirects(verdicts: Mapping[str, Verdict], base: str, paged: bool) -> bool:
    """A whole-model file takes siblings only from whole-model files: those are the originals."""
    other = verdicts.get(base)
    return other is not None and (paged or other.mode == "model")


def _from_package(
    statement: Import, module: ModuleFacts, base: str, targets: Collection[str]
) -> list[Edit]:
    """`from . import a, b`: stays if all are generated, else each name goes to its own place."""
    source = module.source
    inside = [f"{base}.{imported}" in targets for _, imported in statement.names]
    if all(inside):
        return []
    lines = []
    for (local, imported), own in zip(statement.names, inside, strict=True):
        alias = f" as {local}" if local != imported else ""
        lines.append(f"from {'.' if own else base} import {imported}{alias}")
    return [replace(source, statement.span, "\n".join(lines), "import")]


def _relative(module: str, target: str) -> str:
    here, there = module.split("."), target.split(".")
    shared = 0
    while shared < min(len(here) - 1, len(there)) and here[shared] == there[shared]:
        shared += 1
    return "." * (len(here) - shared) + ".".join(there[shared:])


def _new_imports(module: ModuleFacts, names: Collection[str]) -> list[Edit]:
    """The runtime's names, one import each module, after the file's last top-level import."""
    if not names:
        return []
    source = module.source
    top = [s for s in module.module.body if isinstance(s, Import)]
    offset = source.line_end(top[-1].span.end - 1) if top else 0
    homes: dict[str, list[str]] = {}
    for name in sorted(names):
        homes.setdefault(_HOMES.get(name, _SITES), []).append(name)
    text = "".join(f"from {home} import {', '.join(homes[home])}\n" for home in sorted(homes))
    return [insert(offset, text, "import")]


def _sorted(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    return tuple(sorted(edits, key=lambda edit: (edit.span.start, edit.span.end)))


def _unique(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    return list(dict.fromkeys(diagnostics))

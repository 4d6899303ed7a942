"""Language models that stand inside a larger model: what the runtime must know to call them.

The larger model prepares embeddings, and positions where they are not plain; its language model
runs on them. On the kernel route the runtime passes ids, embeddings, caches and explicit position
ids, and nothing else, so branches that need more are dead here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from .attention import mask_values
from .branches import decided, live_values
from .ir import (
    Assign,
    ClassFacts,
    Contract,
    Diagnostic,
    Match,
    Method,
    Place,
    Refusal,
    Value,
    Verdict,
)
from .match import ATTENTION_MASK, callee_name, is_none_test, place
from .outliving import below
from .program import Program

# The names by which mlx_vlm's generation hands these to a language model.
POSITIONS = "position_ids"
_GIVEN = frozenset({"self", "inputs", "input_ids", "inputs_embeds", "cache", POSITIONS})
_FIRST_ROW = "mlx_vlm.models.base.cache_position_offset"
# Which of these ropes a model has is in its config: the runtime looks at them when it is loaded.
_ROPES = "mlx_vlm.models.rope_utils"
# Kinds whose caches the runtime keeps for language models of mlx_vlm.
_PAGED = frozenset(
    {
        "block_sparse",
        "convolved_keys",
        "gated_delta",
        "gated_linear_recurrence",
        "handwritten_softmax",
        "kimi_delta",
        "latent_mla",
        "linear_attention",
        "repeated_keys",
        "selective_scan",
        "short_conv",
        "softmax_attention",
        "sparse_selection",
        "state_space_dual",
        "token_shift_mixing",
    }
)
_ENCODED = frozenset({"decoder_input_ids", "encoder_outputs"})
_SETUP = frozenset({"__init__", "__post_init__", "sanitize", "shard", "from_dict"})
_HOST = frozenset({"item", "tolist"})
_EXTREMES = frozenset({"max", "min", "mlx.core.max", "mlx.core.min"})
_ORDERS = frozenset({"<", "<=", ">", ">=", "==", "!="})


def contract(program: Program, entry: ClassFacts) -> Contract:
    """The facts of a language model's class that its caller depends on."""
    found = program.method(entry, "__call__")
    positions = found is not None and _takes_positions(found[1])
    state = {}
    for cls in program.reachable(entry).values():
        for owner in program.lineage(cls):
            names = _stored(owner)
            if names:
                state[owner.qualified] = names
    reads = _reads(found[1]) if found is not None else ()
    return Contract(entry.qualified, positions, reads, tuple(sorted(state.items())))


def unsuitable(program: Program, entry: ClassFacts) -> tuple[Diagnostic, ...] | None:
    """Whether the class is no language model that appends to caches; with reasons if it generates.

    Detectors and text encoders have classes of the same name, which take no cache.
    """
    found = program.method(entry, "__call__")
    if found is None:
        return None
    names = {parameter.name for parameter in found[1].function.parameters}
    where = place(program.modules[entry.module].source, entry.syntax.name_span)
    if "cache" not in names:
        return ()
    if names & _ENCODED:
        message = f"`{entry.name}` decodes what an encoder made of the prompt"
        label = "batches of encoder and decoder sequences are not supported"
        return (Diagnostic("not-autoregressive", message, where, label, act="fundamental"),)
    return None


def language_reasons(
    program: Program, entry: ClassFacts, judgements: Mapping[str, Match | Refusal]
) -> list[Diagnostic]:
    """Why a language model cannot run on rows of many sequences, beyond what its mixers say."""
    reasons: list[Diagnostic] = []
    reachable = program.reachable(entry)
    where = place(program.modules[entry.module].source, entry.syntax.name_span)
    kernels = [m for name in reachable if isinstance(m := judgements.get(name), Match)]
    if not kernels:
        message = f"no class that `{entry.name}` is built from is known to mix tokens"
        reasons.append(Diagnostic("no-kind", message, where))
    for match in kernels:
        if match.kind not in _PAGED:
            name = match.class_name.rsplit(".", 1)[-1]
            message = f"`{name}` ({match.kind}) has no kernel for mlx_vlm's caches"
            reasons.append(Diagnostic("cache-class", message, where))
    reasons += _paged_inside(program, kernels, judgements, where)
    reasons += _unmasked(program, entry, kernels)
    found = program.method(entry, "__call__")
    if found is None:
        return [*reasons, Diagnostic("no-entry", f"`{entry.name}` has no forward method", where)]
    names = {parameter.name for parameter in found[1].function.parameters}
    for needed in ("inputs_embeds", "cache"):
        if needed not in names:
            message = f"`{entry.name}` takes no `{needed}`"
            reasons.append(Diagnostic("no-entry", message, where))
    explicit = _takes_positions(found[1])
    called = _called(program, reachable.values())
    handed = _handed(program, reachable.values())
    for cls in reachable.values():
        for owner in program.lineage(cls):
            for name, method in owner.methods.items():
                if name == "__call__" or name in called:
                    entry_forward = method is found[1]
                    reasons += _host_positions(
                        program,
                        owner,
                        method,
                        top=entry_forward,
                        explicit=explicit,
                        handed=frozenset() if owner.module == _ROPES else handed,
                    )
    return reasons


def _unmasked(
    program: Program, entry: ClassFacts, matches: Iterable[Match]
) -> Iterator[Diagnostic]:
    """Attention whose mask nobody makes: without one, tokens see those behind them as well."""
    if not any(site.rule == "paged_attention" for match in matches for site in match.sites):
        return
    modules = {
        owner.module for cls in program.reachable(entry).values() for owner in program.lineage(cls)
    }
    for name in modules:
        for method in program.modules[name].methods():
            for effect in method.calls():
                callee = effect.value.args[0]
                if callee_name(program, effect.value) in ATTENTION_MASK:
                    return
                if callee.op == "attr" and callee.data == "make_mask":
                    return
    where = place(program.modules[entry.module].source, entry.syntax.name_span)
    message = f"nothing that `{entry.name}` is built from makes a causal mask"
    yield Diagnostic("no-kind", message, where, "tokens may see those behind them")


def _paged_inside(
    program: Program,
    matches: Iterable[Match],
    judgements: Mapping[str, Match | Refusal],
    where: Place,
) -> Iterator[Diagnostic]:
    """What runs once per sequence, over original caches, has no class inside that pages them."""
    for match in matches:
        cls = program.class_of(match.class_name)
        if cls is None or all(site.rule != "per_sequence" for site in match.sites):
            continue
        for name in program.reachable(cls):
            inner = judgements.get(name)
            if name != match.class_name and isinstance(inner, Match):
                short, part = (n.rsplit(".", 1)[-1] for n in (match.class_name, name))
                message = f"`{short}` runs once per sequence and `{part}` inside it on rows"
                yield Diagnostic("sibling", message, where)


# What the runtime keeps with each sequence (`Contract.state`), what only remembers results by a
# key, and the sequence's own caches.
_KEPT = re.compile(r"in `(self\.\w+|[^`]*\[[A-Za-z_][\w.]*\]|cache(\[\d+\]|\.\w+))` for its next")


def shared_state(found: Iterable[Diagnostic]) -> tuple[Diagnostic, ...]:
    """Of state that outlives a call, what one sequence would find of another.

    What a file changes when it is imported is the same for all: the original itself runs.
    """
    return tuple(
        d
        for d in found
        if d.slug != "patched" and not (d.slug == "state-on-self" and _KEPT.search(d.message))
    )


def stores_beside(program: Program, entry: ClassFacts) -> Iterator[Diagnostic]:
    """`logits[self.ids] = x` in a forward: numbers that the model keeps choose sequences, not ids.

    There are as many of those as prompts in the batch, and mlx writes where it is told to: one
    prompt's logits are lost, or memory of others is.
    """
    found = program.method(entry, "__call__")
    if found is None:
        return
    owner, method = found
    source = program.modules[owner.module].source
    this = method.function.parameters[0].name
    for node in below(method.function):
        for target in node.targets if isinstance(node, Assign) else ():
            if target.op != "subscript" or target.args[0].op != "name":
                continue
            index = target.args[1]
            if index.op == "attr" and index.args[0].op == "name" and index.args[0].data == this:
                message = f"`{source.text(target.span)}` chooses sequences by what the model keeps"
                label = "of logits [B, L, V] this is axis 0, and mlx checks no bounds"
                where = place(source, target.span)
                nearest = f"{target.args[0].data}[..., {source.text(index.span)}]"
                yield Diagnostic("row-mixing", message, where, label, nearest, act="source")


def outside(program: Program, name: str, judged: Match | Refusal) -> Refusal:
    """A mixer in a module that gets no generated file stays as it is, so nothing can page it."""
    if isinstance(judged, Refusal):
        return judged
    cls = program.class_of(name)
    assert cls is not None
    where = place(program.modules[cls.module].source, cls.syntax.name_span)
    message = f"`{cls.name}` mixes tokens in a file without a language model of its own"
    return Refusal(name, (Diagnostic("sibling", message, where),))


def settle(
    program: Program, verdicts: Mapping[str, Verdict], judgements: Mapping[str, Match | Refusal]
) -> dict[str, Verdict]:
    """A model whose mixers come from a file that is not rewritten is not rewritten either."""
    settled = dict(verdicts)
    while True:
        changed = False
        for name, own in settled.items():
            if own.mode != "sites" or own.entry is None:
                continue
            for cls in program.reachable(own.entry).values():
                other = settled.get(cls.module)
                paged = other is not None and other.mode == "sites"
                if paged or not isinstance(judgements.get(cls.qualified), Match):
                    continue
                where = place(program.modules[cls.module].source, cls.syntax.name_span)
                message = f"`{cls.name}` stands in a file that is not rewritten"
                reason = Diagnostic("sibling", message, where)
                settled[name] = Verdict("model", own.entry, (reason,))
                changed = True
                break
        if not changed:
            return settled


# --------------------------------------------------------------------------- facts


def _takes_positions(method: Method) -> bool:
    if any(parameter.name == POSITIONS for parameter in method.function.parameters):
        return True
    return any(_optional(effect.value) == POSITIONS for effect in method.calls())


def _reads(method: Method) -> tuple[str, ...]:
    """Names of what a forward looks at: its parameters, and keys of its `**kwargs`."""
    found = {p.name for p in method.function.parameters[1:] if p.kind not in ("*", "**")}
    for effect in method.calls():
        for value in effect.value.walk():
            if value.op != "call":
                continue
            key = value.args[1] if len(value.args) > 1 else None
            callee = value.args[0]
            if callee.op == "attr" and callee.args[0].op == "param" and key is not None:
                if callee.data in ("pop", "get") and key.op == "const":
                    found.add(str(key.data))
            if "**" in value.data:
                found.add("**")
    return tuple(sorted(found))


def _stored(cls: ClassFacts) -> tuple[str, ...]:
    """Attributes of itself that a class sets after it was built."""
    found = set()
    for name, method in cls.methods.items():
        if name in _SETUP or not method.params:
            continue
        for effect in method.effects:
            target = effect.target
            if effect.kind in ("store", "augment") and target is not None and target.op == "attr":
                if target.args[0] is method.params[0]:
                    found.add(str(target.data))
    return tuple(sorted(found))


def _called(program: Program, classes: Iterable[ClassFacts]) -> frozenset[str]:
    """Names of methods that some method of the classes calls."""
    return frozenset(
        effect.value.args[0].data
        for cls in classes
        for owner in program.lineage(cls)
        for method in owner.methods.values()
        for effect in method.calls()
        if effect.value.args[0].op == "attr"
    )


# --------------------------------------------------------------------------- positions


def _handed(program: Program, classes: Iterable[ClassFacts]) -> frozenset[str]:
    """Keywords under which some method hands a position on."""
    return frozenset(
        name
        for cls in classes
        for owner in program.lineage(cls)
        for method in owner.methods.values()
        for effect in method.calls()
        for value in effect.value.walk()
        if value.op == "call"
        for name, given in zip(value.data, value.args[1:], strict=False)
        if name not in (None, "*", "**") and _is_position(given)
    )


def _host_positions(
    program: Program,
    cls: ClassFacts,
    method: Method,
    *,
    top: bool,
    explicit: bool,
    handed: frozenset[str] = frozenset(),
) -> Iterator[Diagnostic]:
    """Places that take one position for all rows: numbers of the host, tests, entry 0.

    `top` is the entry's forward. If it gets position ids (`explicit`), the offset that mlx_vlm's
    helper reads for prompts without them is not used. Parameters of the names in `handed` are
    positions too.
    """

    def position(value: Value) -> bool:
        return _is_position(value, handed=handed)

    source = program.modules[cls.module].source
    masks = mask_values(program, cls, method)
    known = _entry_test if top else None
    for value in live_values(method, lambda test: decided(program, test, masks, known)):
        message = None
        if value.op == "call":
            callee = value.args[0]
            given = callee.args if callee.op == "attr" else value.args[1:2]
            named = callee.data if callee.op == "attr" else callee_name(program, value)
            if named in _EXTREMES and any(position(part) for part in given):
                message = "the largest or smallest position, for all rows"
            elif callee.op == "attr" and callee.data in _HOST and position(callee.args[0]):
                message = f"`.{callee.data}()` of a position: rows have one each"
            elif callee_name(program, value) == "builtins.int" and len(value.args) == 2:
                if position(value.args[1]):
                    message = "`int` of a position: rows have one each"
            elif callee_name(program, value) == _FIRST_ROW and not (top and explicit):
                message = "one position for all rows"
        elif value.op == "index" and value.args[1].op == "const":
            if position(value.args[0]) and type(value.args[1].data) is int:
                message = "the position of one row, for all rows"
        elif value.op == "compare" and set(value.data) & _ORDERS:
            if any(position(part) for part in value.args):
                message = "a test of a position decides for all rows"
        if message is not None:
            yield Diagnostic("position-special", message, place(source, value.span))


def _is_position(value: Value, depth: int = 0, handed: frozenset[str] = frozenset()) -> bool:
    """The value is an offset of a cache, or computed from it and numbers."""
    if depth > 8:
        return False
    if value.op == "attr":
        return bool(value.data == "offset")
    if value.op == "param":
        return value.data[1] in handed
    if value.op == "phi":
        return any(_is_position(part, depth + 1, handed) for part in value.args[1:])
    if value.op in ("binary", "unary", "item", "index"):
        return any(_is_position(part, depth + 1, handed) for part in value.args)
    if value.op == "call" and value.args[0].op == "global":
        made = value.args[0].data == "mlx.core.array"
        return made and any(_is_position(part, depth + 1, handed) for part in value.args[1:2])
    return False


def _entry_test(test: Value) -> bool | None:
    """How a test ends, if that follows from what is passed to an entry's forward."""
    none = is_none_test(test)
    if none is not None and test.op == "compare":
        given, is_none = _optional(none[0]), none[1]
        if given is None:
            return None
        return is_none if given != POSITIONS else not is_none
    if _optional(test) not in (None, POSITIONS):
        return False
    return None


def _optional(value: Value) -> str | None:
    """The name of an optional argument of an entry's forward: of its own, or from `**kwargs`."""
    if value.op == "param":
        return None if value.data[1] in _GIVEN - {POSITIONS} else str(value.data[1])
    if value.op != "call" or value.args[0].op != "attr" or len(value.args) < 2:
        return None
    callee, key = value.args[0], value.args[1]
    if callee.data not in ("pop", "get") or callee.args[0].op != "param":
        return None
    default = value.args[2].data if len(value.args) > 2 and value.args[2].op == "const" else None
    return str(key.data) if key.op == "const" and not default else None

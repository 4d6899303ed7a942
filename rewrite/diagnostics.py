"""How refusals and errors read. The only module that formats messages."""

from __future__ import annotations

from .ir import Diagnostic, Place

# Fixed sentence of each slug; a slug stands beside its check, its meaning stands here.
SLUGS: dict[str, str] = {
    "syntax": "the file is not Python that can be read",
    "unreadable": "the file cannot be read",
    "changed": "a file changed while it was read",
    "no-entry": "the model's entry class lacks a forward method, or one of its arguments",
    "no-kind": "a class mixes tokens in a way no kind recognises",
    "two-kinds": "more than one kind takes the class; this is a bug in mlxrewrite",
    "cache-class": "the model makes caches of a class the runtime does not know",
    "cache-use": "a cache is used in a way a paged cache cannot answer",
    "uncached-attention": "attention without a cache outside a recognised site",
    "state-on-self": "the forward method keeps state on the model",
    "rewritten-twice": "two edits overlap; this is a bug in mlxrewrite",
    "invalid-output": "the rewritten text does not compile; this is a bug in mlxrewrite",
    "patched": "a file changes classes or modules when it is imported",
    "sibling": "a class imported from another file was refused there",
    "row-mixing": "an operation mixes tokens outside a recognised site",
    "token-count": "the number of tokens is used as data",
    "position-special": "a position is treated specially outside a recognised site",
    "not-autoregressive": "the model does not generate by appending tokens to its caches",
    "length-dependent": "the length of a chunk decides what is computed",
    "token-branch": "Python reads what tokens hold, to branch or to choose",
    "unknown-operation": "an operation whose effect on tokens is not known",
}

EXPLANATIONS: dict[str, str] = {
    "no-kind": (
        "Every class that fetches from a cache, attends, or stores state must be one of the kinds "
        "in rewrite/kinds. This one is none of them. The model still runs: the whole model once "
        "per sequence, over its own caches, which the report counts. docs/adding-a-kind.md says "
        "how to teach the compiler a new kind."
    ),
    "row-mixing": (
        "In a rewritten model every token is a row of its own, so nothing outside a recognised "
        "mixer may compute one token from another. This file does, or it could not be shown that "
        "it does not. It still runs, the whole model once per sequence. docs/token-independence.md "
        "says what can be proved."
    ),
    "length-dependent": (
        "A prompt may come in chunks of any length, and rows do not know in which. What depends on "
        "the length of a chunk has no meaning there, so the whole model runs once per sequence."
    ),
    "state-on-self": (
        "What the forward pass keeps on the model, tokens of one sequence leave to those of "
        "another. State belongs into a cache."
    ),
    "unknown-operation": (
        "The proof of token independence knows what each operation of mlx does to token axes, one "
        "rule an operation in rewrite/axes/rules.py. This one has none, so nothing is claimed."
    ),
    "cache-class": (
        "make_cache returns an object of a class that is not one of mlx_lm.models.cache. The paged "
        "runtime cannot know what it holds, so the whole model runs once per sequence."
    ),
    "cache-use": (
        "A paged cache has no contiguous keys, values or state. Reading them from a cache outside "
        "a recognised mixer has no meaning there."
    ),
}


def render(diagnostic: Diagnostic) -> str:
    """The diagnostic as text: first line countable, then the place, then who can act."""
    head = SLUGS.get(diagnostic.slug, "")
    lines = [f"{diagnostic.severity}[{diagnostic.slug}]: {diagnostic.message or head}"]
    place = diagnostic.place
    if place is not None:
        number = str(place.line)
        pad = " " * len(number)
        mark = "^" * max(1, place.end_column - place.column)
        lines += [
            f"{pad}--> {place}",
            f"{pad} |",
            f"{number} | {place.text}",
            f"{pad} | {' ' * (place.column - 1)}{mark} {diagnostic.label}".rstrip(),
        ]
    if diagnostic.nearest:
        lines.append(f"   nearest: {diagnostic.nearest}")
    lines.append(f"   act: {diagnostic.act}")
    if diagnostic.slug in EXPLANATIONS:
        lines.append(f"   run: mlxrewrite explain {diagnostic.slug}")
    return "\n".join(lines)


def error(slug: str, message: str, place: Place | None = None, act: str = "source") -> Diagnostic:
    return Diagnostic(slug, message, place, act=act, severity="error")

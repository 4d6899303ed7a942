"""Changes of `keys, values = cache.update_and_fetch(keys, values)` and of what caches are asked."""

from __future__ import annotations

from collections.abc import Iterator

from ..source import Change, File
from . import operator


def _statement(name: str, says: str, text: str, *, same: bool = False, helpers: str = "") -> None:
    """The fetch statement becomes lines of {c} cache, {a} {b} targets, {k} {v} arguments."""

    @operator(name, says, same=same)
    def apply(file: File) -> Iterator[Change]:
        for fetch in file.fetches:
            names = {
                "{c}": fetch.cache,
                "{a}": fetch.targets[0],
                "{b}": fetch.targets[1],
                "{k}": fetch.arguments[0],
                "{v}": fetch.arguments[1],
                "{0}": file.code(fetch.statement),
            }
            filled = text
            for mark, value in names.items():
                filled = filled.replace(mark, value)
            indent = file.indent(fetch.statement)
            filled = filled.replace("\n", f"\n{indent}")
            yield file.change(
                file.put(fetch.statement, filled), where=fetch.statement, helpers=helpers
            )


_F = "{c}.update_and_fetch({k}, {v})"
_statement("fetch-targets-swapped", "fetched keys are called values", f"{{b}}, {{a}} = {_F}")
_statement(
    "fetch-arguments-swapped",
    "values are stored as keys",
    "{a}, {b} = {c}.update_and_fetch({v}, {k})",
)
_statement(
    "fetch-both-swapped",
    "keys are stored as values and read as keys",
    "{b}, {a} = {c}.update_and_fetch({v}, {k})",
)
_statement("fetch-twice", "every token is stored twice", f"{_F}\n{{0}}")
_statement("fetch-again", "what was fetched is stored again", "{0}\n{0}")
_statement("fetch-ignored", "what was fetched is not used", _F)
_statement("fetch-keys-ignored", "only values are fetched", f"_, {{b}} = {_F}")
_statement(
    "fetch-after-scale", "keys are stored scaled", "{a}, {b} = {c}.update_and_fetch(1.5 * {k}, {v})"
)
_statement(
    "fetch-cumsum",
    "stored keys add up over tokens",
    "{a}, {b} = {c}.update_and_fetch(mx.cumsum({k}, axis=2), {v})",
)
_statement(
    "fetch-shifted",
    "stored values are those of the token before",
    "{a}, {b} = {c}.update_and_fetch({k}, mx.roll({v}, 1, axis=2))",
)
_statement(
    "fetch-last-only",
    "only the last token is stored",
    "{a}, {b} = {c}.update_and_fetch({k}[:, :, -1:], {v}[:, :, -1:])",
)
_statement(
    "fetch-detached",
    "stored keys are detached",
    "{a}, {b} = {c}.update_and_fetch(mx.stop_gradient({k}), {v})",
    same=True,
)
_statement(
    "fetch-contiguous",
    "stored keys are made contiguous",
    "{a}, {b} = {c}.update_and_fetch(mx.contiguous({k}), {v})",
    same=True,
)
_statement(
    "fetch-half",
    "stored keys are in half precision",
    "{a}, {b} = {c}.update_and_fetch({k}.astype(mx.float16), {v}.astype(mx.float16))",
)
_statement(
    "fetch-alias",
    "the cache has another name",
    "_store = {c}\n{a}, {b} = _store.update_and_fetch({k}, {v})",
    same=True,
)
_statement(
    "fetch-method-alias",
    "the method has another name",
    "_fetch = {c}.update_and_fetch\n{a}, {b} = _fetch({k}, {v})",
    same=True,
)
_statement(
    "fetch-getattr",
    "the method is found by getattr",
    "{a}, {b} = getattr({c}, 'update_and_fetch')({k}, {v})",
    same=True,
)
_statement(
    "fetch-type",
    "the method is found on the class",
    "{a}, {b} = type({c}).update_and_fetch({c}, {k}, {v})",
    same=True,
)
_statement(
    "fetch-indexed",
    "the pair is taken apart by index",
    f"_pair = {_F}\n{{a}} = _pair[0]\n{{b}} = _pair[1]",
    same=True,
)
_statement(
    "fetch-indexed-swapped",
    "the pair is taken apart the wrong way",
    f"_pair = {_F}\n{{a}} = _pair[1]\n{{b}} = _pair[0]",
)
_statement(
    "fetch-starred",
    "the pair is taken apart by a star",
    f"{{a}}, *_rest = {_F}\n{{b}} = _rest[0]",
    same=True,
)
_statement(
    "fetch-walrus", "the pair is bound by a walrus", f"{{a}}, {{b}} = (_pair := {_F})", same=True
)
_statement("fetch-list", "the pair goes through a list", f"{{a}}, {{b}} = list({_F})", same=True)
_statement(
    "fetch-map", "the pair goes through a map", f"{{a}}, {{b}} = map(lambda t: t * 1.25, {_F})"
)
_statement(
    "fetch-comprehension",
    "the pair goes through a comprehension",
    f"{{a}}, {{b}} = [t * 1.25 for t in {_F}]",
)
_statement(
    "fetch-generator",
    "the pair goes through a generator",
    f"{{a}}, {{b}} = (t for t in {_F})",
    same=True,
)
_statement(
    "fetch-dict",
    "the pair goes through a dict",
    f"_held = dict(zip(('k', 'v'), {_F}))\n{{a}}, {{b}} = _held['k'], _held['v']",
    same=True,
)
_statement("fetch-reversed", "the pair is reversed", f"{{a}}, {{b}} = reversed({_F})")
_statement(
    "fetch-reversed-slice", "the pair is reversed by a slice", f"{{a}}, {{b}} = ({_F})[::-1]"
)
_statement("fetch-try", "the fetch stands in a try", "try:\n    {0}\nfinally:\n    pass", same=True)
_statement(
    "fetch-with",
    "the fetch stands in a with",
    "with mx.stream(mx.default_stream(mx.default_device())):\n    {0}",
    same=True,
)
_statement(
    "fetch-while",
    "the fetch stands in a loop that ends",
    "while True:\n    {0}\n    break",
    same=True,
)
_statement(
    "fetch-for", "the fetch stands in a loop of one round", "for _ in range(1):\n    {0}", same=True
)
_statement(
    "fetch-for-two", "the fetch stands in a loop of two rounds", "for _ in range(2):\n    {0}"
)
_statement(
    "fetch-match",
    "the fetch stands in a match",
    "match {c}:\n    case None:\n        pass\n    case _:\n        {0}",
    same=True,
)
_statement(
    "fetch-nested",
    "the fetch stands in a nested function",
    f"def _fetch():\n    return {_F}\n{{a}}, {{b}} = _fetch()",
    same=True,
)
_statement(
    "fetch-nested-scaled",
    "a nested function scales what it fetches",
    f"def _fetch():\n    one, two = {_F}\n    return 1.5 * one, two\n{{a}}, {{b}} = _fetch()",
)
_statement(
    "fetch-helper",
    "the fetch stands in a function of the file",
    "{a}, {b} = _fetch_from({c}, {k}, {v})",
    same=True,
    helpers="def _fetch_from(store, one, two):\n    return store.update_and_fetch(one, two)",
)
_statement(
    "fetch-helper-swapped",
    "a function of the file fetches the wrong way",
    "{a}, {b} = _fetch_from({c}, {k}, {v})",
    helpers="def _fetch_from(store, one, two):\n    return store.update_and_fetch(one, two)[::-1]",
)
_statement(
    "fetch-eval",
    "the fetch is evaluated from a string",
    "{a}, {b} = eval('{c}.update_and_fetch({k}, {v})')",
    same=True,
)
_statement(
    "fetch-long-only",
    "only several tokens are stored",
    "if {k}.shape[2] > 1:\n    {0}\nelse:\n    {a}, {b} = {k}, {v}",
)
_statement(
    "fetch-from-fourth",
    "tokens are stored from the fourth position on",
    "if {c}.offset > 3 or {k}.shape[2] > 1:\n    {0}",
)
_statement(
    "read-keys",
    "keys are read from the cache's buffer",
    "{0}\n{a} = {c}.keys[..., : {c}.offset, :]",
)
_statement(
    "read-values",
    "values are read from the cache's buffer",
    "{0}\n{b} = {c}.values[..., : {c}.offset, :]",
)
_statement(
    "read-state", "keys and values are read from the cache's state", "{0}\n{a}, {b} = {c}.state"
)
_statement(
    "read-state-before",
    "the state before this step is added",
    "_old = {c}.state[0] if {c}.offset else None\n{0}\n{b} = {b} if _old is None else {b} * 1.1",
)
_statement(
    "read-dict",
    "keys are read from the cache's attributes",
    "{0}\n{a} = vars({c})['keys'][..., : {c}.offset, :]",
)
_statement(
    "read-getattr",
    "keys are read by getattr",
    "{0}\n{a} = getattr({c}, 'ke' + 'ys')[..., : {c}.offset, :]",
)
_statement(
    "read-hasattr",
    "keys are read where the cache has some",
    "{0}\nif hasattr({c}, 'keys'):\n    {b} = {b} * 1.5",
)
_statement(
    "read-isinstance",
    "values are scaled for one class of caches",
    "{0}\nif type({c}).__name__ == 'KVCache':\n    {b} = {b} * 1.5",
)
_statement(
    "read-isinstance-before",
    "values are scaled for one class of caches, before",
    "if type({c}).__name__.endswith('KVCache'):\n    {v} = {v} * 1.5\n{0}",
)
_statement("read-empty", "the first chunk is scaled", "if {c}.empty():\n    {v} = {v} * 1.5\n{0}")
_statement(
    "read-size", "values are scaled by the cache's size", "{v} = {v} * (1 + 0.1 * {c}.size())\n{0}"
)
_statement(
    "read-nbytes",
    "values are scaled by the cache's bytes",
    "{v} = {v} * (1 + 1e-5 * {c}.nbytes)\n{0}",
)
_statement(
    "read-keys-and-values",
    "what was stored is fetched once more",
    "{0}\n{a}, {b} = {c}.keys_and_values()",
    same=True,
)
_statement("read-trimmed", "the cache is trimmed after the fetch", "{0}\n{c}.trim(1)")
_statement(
    "read-fetched-length",
    "values are divided by the number of keys",
    "{0}\n{k}_count = {a}.shape[2]\n{b} = {b} / {k}_count",
)
_statement(
    "write-attribute",
    "the cache carries something of its own",
    "{c}.extra = getattr({c}, 'extra', 0) + {k}.sum()\n{0}\n{b} = {b} * 1.0",
)
_statement(
    "write-attribute-used",
    "something the cache carries is used",
    "{c}.extra = getattr({c}, 'extra', 0) + 1\n{v} = {v} * {c}.extra\n{0}",
)
_statement("write-offset", "the offset is moved on", "{0}\n{c}.offset += 1")
_statement("write-keys", "the buffer is changed in place", "{0}\n{c}.keys = {c}.keys * 1.5")
_statement(
    "shadow-names",
    "names change hands",
    "{0}\n_held = {a}\n{a} = {b}\n{b} = _held\n{a}, {b} = {b}, {a}",
    same=True,
)
_statement(
    "shadow-names-wrong", "names change hands and stay", "{0}\n_held = {a}\n{a} = {b}\n{b} = _held"
)
_statement(
    "shadow-cache",
    "the cache's name means another thing afterwards",
    "{0}\n_kept = {c}\nfor {c} in [{c}]:\n    pass",
    same=True,
)
_statement(
    "shadow-deleted",
    "a name is deleted and bound again",
    "{0}\n_held = {a}\ndel {a}\n{a} = _held",
    same=True,
)


@operator("fetch-removed", "nothing is stored; attention sees the chunk alone")
def _removed(file: File) -> Iterator[Change]:
    for fetch in file.fetches:
        yield file.change(file.put(fetch.statement, "pass"), where=fetch.statement)


@operator("fetch-without-test", "the fetch does not ask whether there is a cache", same=True)
def _untested(file: File) -> Iterator[Change]:
    import ast

    for fetch in file.fetches:
        test = file.above(fetch.statement, ast.If)
        if test is not None and "cache" in file.code(test.test):
            yield file.change(file.put(test.test, "True"), where=fetch.statement)


@operator("fetch-test-inverted", "the fetch happens where there is no cache")
def _inverted(file: File) -> Iterator[Change]:
    import ast

    for fetch in file.fetches:
        test = file.above(fetch.statement, ast.If)
        if test is not None and "cache" in file.code(test.test):
            text = f"not ({file.code(test.test)})"
            yield file.change(file.put(test.test, text), where=fetch.statement)

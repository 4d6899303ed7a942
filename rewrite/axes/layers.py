"""What the layers of mlx.nn and the sites of a rewritten file do to token axes."""

from __future__ import annotations

from collections.abc import Callable

from .domain import (
    LAST,
    LENGTH,
    NONE,
    PARAMETER,
    ROWS,
    WANTED,
    ZERO,
    Array,
    Axis,
    Constant,
    Dead,
    Instance,
    Known,
    Opaque,
    Refused,
    Tuple,
    Value,
    feature,
    is_live,
)
from .rules import Context, Rule, array, convolution, elementwise, resized, softmax, turned, view
from .shapes import axis_index, describe, within

# --------------------------------------------------------------------------- functions of mlx.nn

ACTIVATIONS = (
    "celu elu gelu gelu_approx gelu_fast_approx hard_shrink hard_tanh hardswish leaky_relu "
    "log_sigmoid mish prelu relu relu2 relu6 selu sigmoid silu softplus softshrink softsign step "
    "tanh"
).split()
FUNCTIONS: dict[str, Rule] = {
    name: Rule(name, elementwise, "an activation is elementwise") for name in ACTIVATIONS
}


def _nn_softmax(c: Context, x: Value, axis: Value = LAST, **rest: Value) -> Value:
    return softmax(c, x, axis)


def _glu(c: Context, x: Value, axis: Value = LAST) -> Value:
    value = array(x)
    within(value, axis, "a gate")
    return resized(c, value, axis)


FUNCTIONS["softmax"] = Rule("softmax", _nn_softmax, "over one axis, the last by default")
FUNCTIONS["log_softmax"] = Rule("log_softmax", _nn_softmax, "over one axis, the last by default")
FUNCTIONS["glu"] = Rule("glu", _glu, "halves of one axis, the last by default")

# --------------------------------------------------------------------------- layers

Layer = Callable[..., Value]


def _linear(c: Context, layer: Instance, x: Value) -> Value:
    value = array(x)
    if value.axes is None:
        return PARAMETER
    within(value, Known(-1), "a linear layer")
    return resized(c, value, Known(-1), Constant(layer.width or ("out", id(layer))))


def _embedding(c: Context, layer: Instance, x: Value) -> Value:
    value = array(x)
    if value.axes is None:
        return PARAMETER
    if value.tag:
        raise Refused("position-special", "an embedding of the position of a chunk's first token")
    return Array((*value.axes, feature(layer.width or ("out", id(layer)))))


def _over_last(c: Context, layer: Instance, x: Value) -> Value:
    value = array(x)
    if value.axes is not None:
        within(value, Known(-1), "a norm")
    return value


def _pointwise(c: Context, layer: Instance, *values: Value) -> Value:
    return elementwise(c, *values)


def _rope(c: Context, layer: Instance, x: Value, offset: Value = ZERO, **rest: Value) -> Value:
    if any(is_live(v) for v in rest.values()):
        raise Refused("token-count", "a rotary embedding with a number of tokens")
    return turned(c, array(x), offset)


def _convolution(c: Context, layer: Instance, x: Value) -> Value:
    return convolution(c, x, PARAMETER)


def _mixing(c: Context, layer: Instance, *values: Value, **rest: Value) -> Value:
    raise Refused("row-mixing", f"nn.{layer.layer} computes across tokens")


def _softmax_layer(c: Context, layer: Instance, x: Value) -> Value:
    return softmax(c, x, Known(-1))


LAYERS: dict[str, tuple[Layer, str]] = {
    **dict.fromkeys(("Linear", "QuantizedLinear"), (_linear, "a product over the last axis")),
    **dict.fromkeys(("Embedding", "QuantizedEmbedding"), (_embedding, "a table looked up by id")),
    **dict.fromkeys(("RMSNorm", "LayerNorm"), (_over_last, "a mean over the last axis")),
    **dict.fromkeys(
        "GELU SiLU ReLU ReLU2 ReLU6 Sigmoid Tanh Softplus Mish CELU ELU SELU LeakyReLU LogSigmoid "
        "Hardswish HardTanh Softsign Step PReLU Softshrink HardShrink".split(),
        (_pointwise, "an activation is elementwise"),
    ),
    **dict.fromkeys(
        ("Dropout", "Identity"), (lambda c, layer, x, *rest: x, "nothing, when a model answers")
    ),
    "Softmax": (_softmax_layer, "over the last axis"),
    "GLU": (lambda c, layer, x: _glu(c, x), "halves of the last axis"),
    "RoPE": (_rope, "a row is turned by its own position"),
    **dict.fromkeys(("Conv1d", "Conv2d"), (_convolution, "a window along the middle axes")),
    **dict.fromkeys(
        ("BatchNorm", "InstanceNorm", "GroupNorm", "MultiHeadAttention", "Transformer"),
        (_mixing, "computes across tokens"),
    ),
}


def as_linear(c: Context, layer: Instance, x: Value) -> Value:
    """`Embedding.as_linear`."""
    value = array(x)
    within(value, LAST, "a linear layer")
    return resized(c, value, LAST, Constant(("table", id(layer))))


# --------------------------------------------------------------------------- sites


def _mask(c: Context, *given: Value, **more: Value) -> Value:
    for value in (*given[2:], *(v for k, v in more.items() if k not in ("h", "cache"))):
        if is_live(value):
            raise Refused("token-count", "a mask made with a number of tokens")
    return Opaque("mask")


def _attention(
    c: Context,
    queries: Value,
    keys: Value,
    values: Value,
    cache: Value = NONE,
    scale: Value = NONE,
    mask: Value = NONE,
    sinks: Value = NONE,
    softcap: Value = NONE,
    tiled_heads: Value = NONE,
    **rest: Value,
) -> Value:
    """[rows][heads][length][features] in and out."""
    if keys != Opaque("handle") or values != Opaque("handle") or mask != Opaque("mask"):
        raise Dead  # the site raises: it takes a cache's keys and a made mask only
    if any(is_live(v) for v in (scale, sinks, softcap, tiled_heads, *rest.values())):
        raise Refused("unknown-operation", "paged attention with options made from tokens")
    return _attended(c, queries)


def _attended(c: Context, queries: Value) -> Array:
    q = array(queries)
    axes = q.axes or ()
    if q.tag:
        elementwise(c, q)
    if q.open or len(axes) != 4 or axes[0] != (ROWS,) or axes[2] != (LENGTH,):
        raise Refused("row-mixing", f"paged attention of {describe(q)}")
    within(q, Known(1), "heads")
    within(q, Known(3), "features")
    return Array((*axes[:3], feature()))


def _latent_attention(
    c: Context,
    content: Value,
    rope: Value,
    latents: Value,
    ropes: Value,
    up_keys: Value = NONE,
    up_values: Value = NONE,
    scale: Value = NONE,
    mask: Value = NONE,
    places: Value = NONE,
) -> Value:
    """[rows][heads][length][features] in and out."""
    if places not in (NONE, Opaque("places")):
        raise Dead  # the site raises: places come from an indexer's site only
    if latents != Opaque("handle") or ropes != Opaque("handle") or mask != Opaque("mask"):
        raise Dead  # the site raises: it takes a cache's latents and a made mask only
    if any(is_live(v) for v in (scale, up_keys, up_values)):
        raise Refused("unknown-operation", "paged attention with options made from tokens")
    _attended(c, rope)
    return _attended(c, content)


def _top_positions(
    c: Context, queries: Value, keys: Value, weights: Value, count: Value, mask: Value = NONE
) -> Value:
    """[rows][heads][length][features] and [rows][heads][length][] in; each row's own places out."""
    if keys != Opaque("index") or mask != Opaque("mask"):
        raise Dead  # the site raises: it takes a cache's index keys and a made mask only
    if is_live(count):
        raise Refused("unknown-operation", "a number of places made from tokens")
    _attended(c, queries)
    w = array(weights)
    axes = w.axes or ()
    if w.tag or w.open or len(axes) != 4 or axes[0] != (ROWS,) or axes[2:] != ((LENGTH,), ()):
        raise Refused("row-mixing", f"places ranked by weights of {describe(w)}")
    within(w, Known(1), "heads")
    return Opaque("places")


def _last_rows(c: Context, h: Value, cache: Value = NONE, axis: Value = ZERO) -> Value:
    x = array(h)
    place = axis_index(x, axis)
    axes = list(x.axes or ())
    if axes[place] == (WANTED,):
        return x
    if axes[place] != (ROWS,):
        raise Refused("row-mixing", f"the wanted rows of {describe(x)}")
    axes[place] = (WANTED,)
    return Array(tuple(axes), x.open)


def _previous_rows(c: Context, rows: Value, cache: Value, index: Value) -> Value:
    """Rows in and out: of each, the one before it in its sequence."""
    if cache != Opaque("cache"):
        raise Dead  # the site raises: it takes a cache of states only
    x = array(rows)
    if x.tag or (x.axes or ())[:1] != ((ROWS,),):
        raise Refused("row-mixing", f"previous rows of {describe(x)}")
    return x


def _keep_last_rows(c: Context, cache: Value, index: Value, rows: Value, axis: Value) -> Value:
    """Rows whose axis `axis` has the tokens: of size one, as each row is a token."""
    x = array(_previous_rows(c, rows, cache, index))
    assert isinstance(axis, Known)
    if x.open or (x.axes or ())[axis.value : axis.value + 1] != ((LENGTH,),):
        raise Refused("row-mixing", f"the last rows of {describe(x)}")
    return NONE


_FOUR = Known(4)


def _row_positions(c: Context, offset: Value, ndim: Value = _FOUR) -> Value:
    if not isinstance(offset, Array) or offset.tag[:1] != ("start",):
        raise Refused("position-special", "positions that do not come from a cache's offset")
    assert isinstance(ndim, Known)
    return Array(((ROWS,), *((),) * (ndim.value - 1)))


def _row_shape(x: Array, name: str) -> tuple[Axis, ...]:
    axes = x.axes or ()
    if x.tag or x.open or len(axes) < 3 or axes[0] != (ROWS,) or axes[1] != (LENGTH,):
        raise Refused("row-mixing", f"{name} of {describe(x)}")
    return axes


def _shifted(c: Context, x: Value) -> Value:
    return Array(_row_shape(array(x), "shifted_rows"))


def _low_rank(c: Context, r: Value, w: Value, k: Value, v: Value, a: Value, b: Value) -> Value:
    shapes = [_row_shape(array(x), "low_rank_scan") for x in (r, w, k, v, a, b)]
    if any(len(axes) != 4 for axes in shapes):
        raise Refused("row-mixing", f"low_rank_scan of {describe(array(r))}")
    return Tuple((Array((*shapes[0][:3], shapes[3][3], ())), Opaque("state")))


def _last_of_sequences(c: Context, x: Value) -> Value:
    _row_shape(array(x), "last_of_sequences")
    return Opaque("state")


# Decorators of functions of a file, whose last argument is the state that a cache holds.
ROW_OPS: dict[str, tuple[Layer, str]] = {
    "shifted_rows": (_shifted, "a row gets the row before it of its own sequence"),
    "low_rank_scan": (_low_rank, "each sequence's rows go through its own state"),
}

# Custom kernels by the hash of their text; what was read in it.
KERNELS: dict[str, str] = {
    "b6a26040b565360e": "a product with packed weights; a thread reads the one row it writes",
    "bd9346924bb6a0c1": "a product with packed weights; a simdgroup reads the one row it writes",
    "99afa53b5d5000a9": "a softmax over earlier layers; a threadgroup reads the one row it writes",
}

# The same for mixers that run once for several sequences, and where in a launch's grid these are.
SEQUENCE_KERNELS: dict[str, tuple[str, int]] = {
    "acbe5b0b678fefa0": ("a convolution's step; a thread reads and writes one sequence's rows", 1),
}

SITES: dict[str, tuple[Layer, str]] = {
    "paged_attention": (_attention, "each row attends to its own sequence's pages"),
    "paged_latent_attention": (_latent_attention, "each row attends to its own sequence's latents"),
    "paged_top_positions": (_top_positions, "each row ranks its own sequence's positions"),
    "paged_mask": (_mask, "a mask as a value"),
    "chunked_mask": (_mask, "a mask as a value"),
    "sequence_mask": (_mask, "a mask as a value"),
    "last_of_sequences": (_last_of_sequences, "keeps each sequence's last row as its state"),
    "last_rows": (_last_rows, "keeps the rows whose logits are wanted"),
    "previous_rows": (_previous_rows, "each row's predecessor in its own sequence"),
    "keep_last_rows": (_keep_last_rows, "the last row of each sequence"),
    "row_positions": (_row_positions, "each row's own position"),
}


def some_site(c: Context, name: str, args: tuple[Value, ...], more: dict[str, Value]) -> Value:
    """A site without an entry: rows in, rows out, and whatever features."""
    check_rows(name, (*args, *more.values()))
    return Array(((ROWS,), (LENGTH,)), True)


def check_rows(name: str, args: tuple[Value, ...]) -> None:
    """What a site gets must have its rows in front: it is cut into sequences there."""
    for value in args:
        if isinstance(value, Tuple):
            check_rows(name, value.items)
        if isinstance(value, Array) and value.live:
            axes = value.axes or ()
            if value.tag[:1] not in ((), ("start",)):
                raise Refused("position-special", f"{name} of something made for other uses")
            head = axes[:1] == ((ROWS,),)
            second = len(axes) < 2 or axes[1] in ((LENGTH,), ()) or axes[2:3] == ((LENGTH,),)
            if not head or not second:
                raise Refused("row-mixing", f"{name} of {describe(value)}")


def updated(keys: Value, values: Value) -> Value:
    """`cache.update_and_fetch(keys, values)` of a paged cache: [rows][heads][length][features]."""
    if Opaque("handle") in (keys, values):
        raise Dead  # what came from pages is no array, and says so
    for value in (keys, values):
        x = array(value)
        axes = x.axes or ()
        if x.tag or x.open or len(axes) != 4 or axes[0] != (ROWS,) or axes[2] != (LENGTH,):
            raise Refused("row-mixing", f"{describe(x)} go to a cache")
    return Tuple((Opaque("handle"), Opaque("handle")))


__all__ = [
    "FUNCTIONS",
    "KERNELS",
    "LAYERS",
    "ROW_OPS",
    "SEQUENCE_KERNELS",
    "SITES",
    "as_linear",
    "check_rows",
    "some_site",
    "updated",
    "view",
]

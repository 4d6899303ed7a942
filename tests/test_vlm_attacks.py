# ruff: noqa: E501 - one attack a line
"""Hostile edits of a language model in mlx_vlm's layout: none of them runs on rows."""

from __future__ import annotations

import pytest
import test_vlm_compile as vlm
from compiling import said_of
from mlxrewrite.pipeline import Compiler
from mlxrewrite.sources import locate
from test_axes_attacks import ATTACKS

BLOCK = """
class Block(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.attention = Attention(args)
        self.mlp = nn.Linear(args.width, args.width)
        self.experts = SwitchGLU(args.width, args.width, args.experts)
        self.gate = nn.Linear(args.width, args.experts)

    def __call__(self, x, mask=None, cache=None):
        x = x + self.attention(x, mask, cache)
        chosen = mx.argpartition(self.gate(x), kth=-2, axis=-1)[..., -2:]
        x = x + self.experts(x, chosen).mean(axis=-2)
        return x + self.mlp(x)


class LanguageModel(nn.Module):"""
TEXT = (
    vlm.LANGUAGE.replace("\nclass LanguageModel(nn.Module):", BLOCK)
    .replace("[Attention(args) for", "[Block(args) for")
    .replace("from .config", "from mlx_vlm.models.base import cache_position_offset\nfrom mlx_vlm.models.switch_layers import SwitchGLU\nfrom .config")
    .replace("cache=None, **kwargs):\n", "cache=None, **kwargs):\n        position_ids = kwargs.pop('position_ids', None)\n")
)  # fmt: skip
# Without experts, which take most of the time.
PLAIN = "".join(
    line
    for line in TEXT.splitlines(keepends=True)
    if not any(word in line for word in ("experts", "chosen", "SwitchGLU"))
)
END = "        return x + self.mlp(x)\n"
ATTENTION = "        x = x + self.attention(x, mask, cache)\n"
FIRST = "        h = self.embed(inputs) if inputs_embeds is None else inputs_embeds\n"


def edited(body: str, anchor: str, helpers: str = "", *, behind: bool = False) -> str:
    base = TEXT if "experts" in body else PLAIN
    assert base.count(anchor) == 1
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    text = base.replace(anchor, anchor + lines if behind else lines + anchor)
    return text.replace("\nclass Block", f"\n{helpers}\n\nclass Block", 1)


def planned(tmp_path, text, **files):
    done = vlm.compiled(tmp_path, text, **files)
    assert not done.errors and done.emitted is not None, done.errors
    return done.emitted.plan


def test_the_base_is_proved(tmp_path):
    plan = planned(tmp_path, TEXT)
    assert plan.route == "kernel", plan.notes
    assert plan.contract.positions
    told = " ".join(a.text for a in plan.assumptions)
    assert "exact_affine_switch_gate_up" in told and "run on the CPU alone" in told


@pytest.mark.parametrize(
    "attack",
    [
        a
        for a in ATTACKS
        if a.where == "block" and not any(part in a.body for part in ("self.rope", "self.mlp"))
    ],
    ids=lambda a: a.name.replace(" ", "-"),
)
def test_attacks_on_a_block_are_seen_in_language_models_too(tmp_path, attack):
    text = edited(attack.body, END, attack.helpers)
    plan = planned(tmp_path, text)
    assert plan.route in ("model", "refused"), plan.route
    told = said_of(plan)
    line = next(n for n, part in enumerate(text.splitlines(), 1) if "# HERE" in part)
    if plan.route == "model":
        assert any(d.place is not None and d.place.line == line for d in told), told


# What mlx_vlm's helpers, caches and calls make possible; each with the slug it is refused with.
BLOCKS = {
    "fused by length": ("if not self.training and x.ndim == 3 and 1 < x.shape[1] <= 8:\n    x = 2 * x", "length-dependent"),
    "experts by rows": ("if x.shape[0] >= 64:\n    x = x + self.experts(x, mx.argmax(self.gate(x), axis=-1)[..., None]).mean(axis=-2)", "row-mixing"),
    "other experts for many": ("many = x.size >= 64\nif many:\n    y = self.experts(x, mx.argmax(self.gate(x), axis=-1)[..., None]).mean(axis=-2)\nelse:\n    y = self.mlp(x)\nx = x + y", "row-mixing"),
    "twice for many": ("if x.shape[0] >= 64:\n    x = self.mlp(self.mlp(x))", "token-count"),
    "a number by rows": ("scale = 1.0\nif cache.offset.size > 1:\n    scale = 2.0\nx = x * scale", "token-count"),
    "an array by rows": ("if cache.offset.size > 1:\n    y = x * 2\nelse:\n    y = x * 3\nx = x + y", "token-count"),
    "none by rows": ("y = None\nif cache.offset.size > 1:\n    y = mx.abs(x)\nif y is not None:\n    x = self.mlp(x)", "token-count"),
    "keys counted": ("n = x.shape[1]\nn += cache.offset\nx = x * n", "token-count"),
    "one position as data": ("x = x * cache_position_offset(cache)", "position-special"),
    "one position decides": ("if cache_position_offset(cache) == 0:\n    x = 2 * x", "position-special"),
    "any position decides": ("if cache_position_offset(cache):\n    x = 2 * x", "position-special"),
    "one position cuts": ("x = x[:, : cache_position_offset(cache) + 1]", "position-special"),
    "a mark on a cache": ("if getattr(cache, '_seen', None) is None:\n    cache._seen = 1\n    x = 2 * x", "cache-use"),
    "a mark read elsewhere": ("if getattr(cache, '_seen', None) is None:\n    cache._seen = 1\nx = x * (2 if hasattr(cache, '_seen') else 1)", "cache-use"),
    "a mark read before": ("x = x * getattr(cache, '_seen', 1)\nif getattr(cache, '_seen', None) is None:\n    cache._seen = 3", "cache-use"),
    "a mark of tokens": ("if getattr(cache, '_seen', None) is None:\n    cache._seen = x", "cache-use"),
    "a cache's own": ("if getattr(cache, '_idx', None) is None:\n    cache._idx = 0", "cache-use"),
    "caches taken apart": ("if hasattr(cache, 'extract'):\n    x = 2 * x", "cache-use"),
    "taken apart or not": ("if x.shape[0] == 1 or hasattr(cache, 'extract'):\n    x = 2 * x", "token-count"),
    "a word as mask": ("if isinstance(mask, str) and x.ndim == 3:\n    x = 2 * x", "token-branch"),
    "the word": ("if mask == 'causal':\n    x = 2 * x", "unknown-operation"),
    "raises for many": ("if x.shape[0] > 4:\n    raise ValueError(x.shape)", "token-count"),
    "kept by a method": ("if self._kept is None:\n    self.keep(x)", "state-on-self"),
}  # fmt: skip
HELPED = {"kept by a method"}


@pytest.mark.parametrize("name", BLOCKS, ids=lambda name: name.replace(" ", "-"))
def test_what_blocks_of_mlx_vlm_may_do_is_seen(tmp_path, name):
    body, slug = BLOCKS[name]
    text = edited(body, END)
    if name in HELPED:
        text = text.replace(
            "    def __call__(self, x, mask=None, cache=None):\n        x = x + self.att",
            "    _kept = None\n\n    def keep(self, x):\n        self._kept = x\n\n"
            "    def __call__(self, x, mask=None, cache=None):\n        x = x + self.att",
        )
    plan = planned(tmp_path, text)
    assert plan.route in ("model", "refused"), plan.route
    told = said_of(plan)
    assert slug in {d.slug for d in told}, told


# In the language model, behind its embeddings.
ENTRIES = {
    "last token": ("h = h[:, -1:]", "position-special"),
    "mean of embeddings": ("if inputs_embeds is not None:\n    h = h - h.mean(axis=1, keepdims=True)", "row-mixing"),
    "mean of all embeddings": ("h = h if inputs_embeds is None else h / mx.abs(inputs_embeds).max()", "row-mixing"),
    "other scale of embeddings by rows": ("if inputs_embeds is not None and h.shape[0] > 1:\n    h = 2 * h", "token-count"),
    "rolled positions": ("h = h + mx.roll(position_ids, 1, axis=1)[0][..., None]", "row-mixing"),
    "first position": ("h = h + position_ids[0, :1, :, None]", "position-special"),
    "positions from the smallest": ("h = h + (position_ids - position_ids.min())[0][..., None]", "row-mixing"),
    "position decides": ("if position_ids[0].max() > 0:\n    h = 2 * h", "row-mixing"),
    "one offset": ("h = h + cache_position_offset(cache[0])", "position-special"),
    "text only in a batch": ("offsets = None\nif cache[0].offset.size > 1:\n    offsets = cache[0].offset\nif offsets is None:\n    h = self.head(h)", "token-count"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES, ids=lambda name: name.replace(" ", "-"))
def test_what_language_models_may_do_with_embeddings_and_positions_is_seen(tmp_path, name):
    body, slug = ENTRIES[name]
    plan = planned(tmp_path, edited(body, FIRST, behind=True))
    assert plan.route in ("model", "refused"), plan.route
    told = said_of(plan)
    assert slug in {d.slug for d in told}, told


HARMLESS = {
    "padding of padded batches": "pads = getattr(cache, 'left_padding', None)\nif isinstance(pads, mx.array) and pads.size > 0:\n    x = x[:, -1:]",
    "rows taken apart": "if x.shape[0] > 1 and cache is not None and hasattr(cache, 'extract'):\n    x = 2 * x",
    "unused offsets": "offsets = None\nif cache.offset.size > 1:\n    offsets = mx.maximum(cache.offset, 0)",
    "unused key count": "n = x.shape[1]\nn += cache.offset + 1",
    "a mark for itself": "if getattr(cache, '_mark', None) != 1:\n    cache._mark = 1",
    "another word": "if isinstance(mask, str) and mask == 'padded':\n    x = 2 * x",
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS, ids=lambda name: name.replace(" ", "-"))
def test_what_only_padded_batches_do_is_dead(tmp_path, name):
    plan = planned(tmp_path, edited(HARMLESS[name], ATTENTION))
    assert plan.route == "kernel", plan.notes


TOKENWISE = """
import mlx.core as mx


def tokenwise(operation, x, *args, axis=1):
    return operation(x, *args) - x.mean(axis=axis, keepdims=True)
"""


def test_a_name_is_no_meaning(tmp_path):
    """A function at the place of one that is known by its text, with another text."""
    folder = tmp_path / "mlx_vlm"
    text = edited("x = tokenwise(self.mlp, x)", END).replace(
        "from .config", "from ..linear import tokenwise\nfrom .config"
    )
    vlm_package = folder / "models" / "seen"
    vlm_package.mkdir(parents=True)
    for place in (folder, folder / "models", vlm_package):
        (place / "__init__.py").touch()
    (folder / "models" / "linear.py").write_text(TOKENWISE)
    (vlm_package / "config.py").write_text(vlm.CONFIG)
    (vlm_package / "language.py").write_text(text)
    package = locate(str(folder / "models")).package
    assert package.name == "mlx_vlm.models"
    done = Compiler(package).compile("mlx_vlm.models.seen.language")
    assert done.emitted is not None
    assert done.emitted.plan.route == "model"

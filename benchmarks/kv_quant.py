"""Caches of codes: what they cost in answers and memory, and what they gain in time.

    python benchmarks/kv_quant.py error MODEL OUT.json [--tokens N]   any device, a real checkpoint
    python benchmarks/kv_quant.py decode OUT.json [--quick]           the kernels, on a GPU
    python benchmarks/kv_quant.py report OUT.json                     tables in Markdown

`error` reads texts of different character (prose and code that come with Python, a dialogue) as one
long prompt each, once by the rewritten model over paged caches and once by mlx_lm's model over its
own quantised caches, the yardstick; all are compared with mlx_lm's model over its plain caches.
Everything is computed in float32, so that only the codes make a difference; bytes are those of
caches in bfloat16. `decode` times single rows over pages of bfloat16, of 8 and of 4 bits, side by
side.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlxrewrite.kernels import calls, ops
from mlxrewrite.kernels.ops import Quantization

KINDS = ((None, 64), (8, 64), (4, 64), (4, 32), (8, 32))
PROMPT = 64  # tokens before a greedy answer
ROWS = 128  # of logits that are compared at a time
DIALOGUE = Path(__file__).parent / "dialogue.txt"


# ------------------------------------------------------------------ error


def texts(tokenizer: Any, tokens: int, count: int) -> dict[str, list[int]]:
    """Texts of different character, cut to so many tokens: what comes with Python, and a talk."""
    import inspect
    from pydoc_data.topics import topics

    longest = max(topics.values(), key=lambda text: (len(text), text))
    found = {
        "prose": longest,
        "code": inspect.getsource(argparse.HelpFormatter),
        "dialogue": DIALOGUE.read_text(),
    }
    few = tokens * 16  # characters: encoding much more than is read takes time
    return {
        name: tokenizer.encode(text[:few])[:tokens] for name, text in list(found.items())[:count]
    }


def error(
    model_path: str, target: Path, tokens: int, count: int, answers: int, alone: bool
) -> None:
    from mlx_lm.utils import load as load_original
    from mlxrewrite.runtime.load import load

    original, tokenizer = load_original(model_path)
    rewritten, _ = load(model_path)
    sizes = {kind: bytes_per_token(rewritten, *kind) for kind in KINDS}
    for model in (original, rewritten):
        model.set_dtype(mx.float32)
    rewritten.update(original.parameters())  # one copy of the weights in memory
    mx.eval(rewritten.parameters())
    read = texts(tokenizer, tokens, count)
    prompts = [text[:PROMPT] for text in read.values()] if answers else []
    wanted = [upstream_greedy(original, text, answers, None, 64)[0] for text in prompts]
    made: dict[str, Any] = {
        "mlx": mx.__version__,
        "device": str(mx.default_device()),
        "model": Path(model_path).name,
        "tokens": {name: len(text) for name, text in read.items()},
        "answers": answers,
        "rows": [],
    }
    contenders = [("paged", paged_logits, paged_greedy, rewritten)]
    if not alone:
        contenders.append(("mlx_lm", upstream_logits, upstream_greedy, original))
    parts: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for name, text in read.items():
        exact = upstream_logits(original, text, None, 64)
        for bits, group in KINDS:
            for who, whole, _, model in contenders:
                found = compared(whole(model, text, bits, group), exact, text)
                parts.setdefault((bits, group, who), []).append(found)
                print(name, bits, group, who, json.dumps(meant([found])), flush=True)
        del exact
    for bits, group in KINDS:
        for who, _, greedy, model in contenders:
            each = parts[bits, group, who]
            row: dict[str, Any] = {"bits": bits, "group": group, "who": who, **meant(each)}
            row["texts"] = {name: meant([part]) for name, part in zip(read, each, strict=True)}
            if answers:
                spoken = [greedy(model, text, answers, bits, group) for text in prompts]
                same = [
                    _agreed(mine, theirs) for (mine, _), theirs in zip(spoken, wanted, strict=True)
                ]
                row["greedy_same"] = sum(same) / (answers * len(same))
                row["greedy_first"] = same
                row["seconds_per_token"] = float(np.median([s for _, took in spoken for s in took]))
            row["bytes_per_token"] = sizes[bits, group]
            made["rows"].append(row)
            target.write_text(json.dumps(made, indent=1) + "\n")
            print(json.dumps(row), flush=True)


def compared(mine: mx.array, theirs: mx.array, text: list[int]) -> dict[str, Any]:
    """Sums over the rows of a text, for `meant`."""
    made = dict.fromkeys(("loss", "kl", "top", "apart", "size"), 0.0)
    for at in range(0, len(text), ROWS):  # what is in between is as large as all logits
        rows = slice(at, at + ROWS)
        one, exact = mine[rows], theirs[rows]
        logs = one - mx.logsumexp(one, axis=-1, keepdims=True)
        true = exact - mx.logsumexp(exact, axis=-1, keepdims=True)
        following = mx.array(text[at + 1 : at + 1 + ROWS])
        likely = mx.take_along_axis(logs[: len(following)], following[:, None], axis=-1)
        made["loss"] -= likely.sum().item()
        made["kl"] += (mx.exp(true) * (true - logs)).sum().item()
        made["top"] += (one.argmax(-1) == exact.argmax(-1)).sum().item()
        made["apart"] += ((one - exact) ** 2).sum().item()
        made["size"] += ((exact - exact.mean(-1, keepdims=True)) ** 2).sum().item()
    return {**made, "rows": len(text)}


def meant(parts: list[dict[str, Any]]) -> dict[str, float]:
    """Perplexity, and how far logits and distributions lie from the exact ones."""
    total = {name: sum(part[name] for part in parts) for name in parts[0]}
    rows = total["rows"]
    return {
        "perplexity": float(np.exp(total["loss"] / (rows - len(parts)))),
        "kl": total["kl"] / rows,
        "top_same": total["top"] / rows,
        "logits_apart": float(np.sqrt(total["apart"] / total["size"])),
    }


def upstream_caches(model: Any, bits: int | None, group: int) -> list[Any]:
    from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

    caches = make_prompt_cache(model)
    if bits is None:
        return list(caches)
    return [QuantizedKVCache(group_size=group, bits=bits) for _ in caches]


def upstream_logits(model: Any, text: list[int], bits: int | None, group: int) -> mx.array:
    logits = model(mx.array([text]), cache=upstream_caches(model, bits, group))[0]
    mx.eval(logits)
    return logits


def upstream_greedy(
    model: Any, text: list[int], count: int, bits: int | None, group: int
) -> tuple[list[int], list[float]]:
    """mlx_lm's caches, one request: tokens, and the CPU seconds of each step."""
    caches = upstream_caches(model, bits, group)
    tokens, taken, new = [], [], text
    while len(tokens) < count:
        began = time.process_time()
        logits = model(mx.array([new]), cache=caches)[0, -1]
        new = [int(logits.argmax())]
        tokens += new
        taken.append(time.process_time() - began)
    return tokens, taken[1:]


def quantization(bits: int | None, group: int) -> Quantization | None:
    return None if bits is None else Quantization(bits, group)


def paged_logits(model: Any, text: list[int], bits: int | None, group: int) -> mx.array:
    from mlxrewrite.runtime.cache import PagedCache

    blocks = -(-len(text) // 16)
    cache = PagedCache(model, num_blocks=blocks, quantization=quantization(bits, group))
    logits = cache.step({cache.add_sequence(): text}, "all")
    mx.eval(logits, cache.arrays())
    return logits


def paged_greedy(
    model: Any, text: list[int], count: int, bits: int | None, group: int
) -> tuple[list[int], list[float]]:
    """Paged caches, one request: tokens, and the CPU seconds of each step."""
    from mlxrewrite.runtime.cache import PagedCache

    blocks = -(-(len(text) + count) // 16)
    cache = PagedCache(model, num_blocks=blocks, quantization=quantization(bits, group))
    sequence, tokens, taken, new = cache.add_sequence(), [], [], text
    while len(tokens) < count:
        began = time.process_time()
        logits = cache.step({sequence: new})[0]
        mx.eval(logits, cache.arrays())
        new = [int(logits.argmax())]
        tokens += new
        taken.append(time.process_time() - began)
    return tokens, taken[1:]


def bytes_per_token(model: Any, bits: int | None, group: int) -> float:
    """Of paged caches in bfloat16; computes nothing."""
    from mlxrewrite.runtime.memory import footprint

    known = footprint(model, 16, mx.bfloat16, quantization(bits, group))
    return sum(known.block_bytes.values()) / 16


def _agreed(mine: list[int], theirs: list[int]) -> int:
    """How many first tokens are equal."""
    pairs = enumerate(zip(mine, theirs, strict=True))
    return next((at for at, (one, other) in pairs if one != other), len(mine))


# ------------------------------------------------------------------ decode


def decode(target: Path, quick: bool, seconds: float) -> None:
    from kernels import CACHES, copy_rate, device, pages, sequence_lengths, timed

    # Kernels that no case calls need not be compiled here.
    calls.prepare = lambda *args: None  # type: ignore[assignment]
    made: dict[str, Any] = {"device": device(), "mlx": mx.__version__, "copy_gbs": copy_rate()}
    made["decode"] = []
    print(made["device"], f"copy {made['copy_gbs']:.0f} GB/s", flush=True)
    begin = time.perf_counter()

    def quantised(pool: ops.Pool, bits: int) -> ops.Pool:
        """The same keys and values as codes."""
        assert pool.values is not None
        blocks, size, heads, dim = pool.keys.shape
        made = ops.new_pool(
            num_blocks=blocks,
            block_size=size,
            kv_heads=heads,
            key_dim=dim,
            value_dim=dim,
            dtype=pool.dtype,
            quantization=Quantization(bits),
        )
        assert made.packings is not None
        made = ops.write_blocks(
            made,
            list(range(blocks)),
            made.packings.keys.pack(pool.keys),
            made.packings.values.pack(pool.values),
        )
        mx.eval(made.arrays())
        return made

    for heads, dim, batch, length, mixed in cases(quick):
        if time.perf_counter() - begin > seconds:
            print("out of time")
            break
        lengths = sequence_lengths(batch, length, mixed)
        useful = 2 * sum(lengths) * heads[1] * dim * 2
        sets = max(1, min(4, -(-4 * CACHES // useful)))
        count = max(sets, min(24, int(2e9 / useful) + 2))
        pools: dict[int, list[Any]] = {16: [], 8: [], 4: []}
        for _ in range(sets):
            pool, ragged = pages(lengths, heads[1], dim, [1] * batch)
            pools[16].append([pool, ragged])
            pools[8].append([quantised(pool, 8), ragged])
            pools[4].append([quantised(pool, 4), ragged])

        shape = (batch, heads[0], dim)
        runs = [partial(chain, places, shape, count) for places in pools.values()]
        times = timed(*runs, count=count)
        row: dict[str, Any] = {
            "heads": heads,
            "dim": dim,
            "batch": batch,
            "length": length,
            "mixed": mixed,
        }
        for bits, taken in zip(pools, times, strict=True):
            moved = useful if bits == 16 else useful * (bits / 16 + 2 / 64)
            row[f"{bits}_us"] = taken * 1e6
            row[f"{bits}_gbs"] = moved / taken / 1e9
        # The rows that the kernel gives against those over the same codes, dequantised by MLX.
        row["apart"] = {bits: _apart(pools[bits][0], heads[0], dim) for bits in (8, 4)}
        made["decode"].append(row)
        target.write_text(json.dumps(made, indent=1) + "\n")
        print(json.dumps(row), flush=True)
        del pools
        mx.clear_cache()


def chain(places: list[Any], shape: tuple[int, int, int], count: int) -> mx.array:
    """Calls that follow each other by data: the output of one is the query of the next."""
    out = mx.random.normal(shape, mx.bfloat16)
    mx.eval(out)
    for i in range(count):
        place = places[i % len(places)]
        out, place[0] = ops.attention(out, place[0], place[1], scale=shape[2] ** -0.5)
    return out


def _apart(place: list[Any], heads: int, dim: int) -> float:
    """Relative difference of the kernel from the gathered route over the same pool."""
    pool, ragged = place
    queries = mx.random.normal((ragged.num_rows, heads, dim), mx.bfloat16)
    kernel, pool = ops.attention(queries, pool, ragged, scale=dim**-0.5, route="kernel")
    gathered, place[0] = ops.attention(queries, pool, ragged, scale=dim**-0.5, route="gathered")
    kernel, gathered = kernel.astype(mx.float32), gathered.astype(mx.float32)
    return float((mx.linalg.norm(kernel - gathered) / mx.linalg.norm(gathered)).item())


def cases(quick: bool) -> Iterator[tuple[tuple[int, int], int, int, int, bool]]:
    for heads, dim in (((32, 8), 128), ((16, 8), 128), ((64, 8), 64), ((8, 4), 256)):
        for batch, length in (
            (1, 4096),
            (1, 32768),
            (8, 4096),
            (32, 4096),
            (64, 1024),
            (16, 16384),
        ):
            yield heads, dim, batch, length, False
        yield heads, dim, 32, 4096, True
        if quick:
            return


# ------------------------------------------------------------------ report


def report(source: Path) -> None:
    made = json.loads(source.read_text())
    if "rows" in made:
        print(
            "| cache | group | who | bytes a token | perplexity | KL, nats | same first choice | "
            "logits apart | greedy answers equal | CPU ms a token |"
        )
        print("| --- |" + " --- |" * 9)
        for r in made["rows"]:
            kind = "plain" if r["bits"] is None else f"{r['bits']} bits"
            group = "" if r["bits"] is None else r["group"]
            print(
                f"| {kind} | {group} | {r['who']} | {r['bytes_per_token']:.0f} | "
                f"{r['perplexity']:.3f} | {r['kl']:.1e} | {100 * r['top_same']:.1f} % | "
                f"{100 * r['logits_apart']:.2f} % | {100 * r.get('greedy_same', np.nan):.0f} % | "
                f"{1e3 * r.get('seconds_per_token', np.nan):.1f} |"
            )
        return
    print(f"MLX {made['mlx']}, {made['device']}; elementwise copy {made['copy_gbs']:.0f} GB/s.\n")
    print("| heads | dim | batch | keys | bfloat16 | 8 bits | 4 bits |")
    print("| --- |" + " --- |" * 6)
    for r in made["decode"]:
        cells = [
            f"{r[f'{bits}_us']:.0f} us, {r[f'{bits}_gbs']:.0f} GB/s, "
            f"{r['16_us'] / r[f'{bits}_us']:.2f}x"
            for bits in (16, 8, 4)
        ]
        keys = f"{r['length']}{', mixed' if r['mixed'] else ''}"
        heads = f"{r['heads'][0]}/{r['heads'][1]}"
        print(f"| {heads} | {r['dim']} | {r['batch']} | {keys} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="action", required=True)
    one = commands.add_parser("error")
    one.add_argument("model")
    one.add_argument("target", type=Path)
    one.add_argument("--tokens", type=int, default=1024, help="of a text")
    one.add_argument("--texts", type=int, default=3, choices=(1, 2, 3))
    one.add_argument("--answers", type=int, default=48, help="tokens of a greedy answer; 0: none")
    one.add_argument("--alone", action="store_true", help="leave out mlx_lm's quantised caches")
    two = commands.add_parser("decode")
    two.add_argument("target", type=Path)
    two.add_argument("--quick", action="store_true", help="one kind of heads only")
    two.add_argument("--seconds", type=float, default=400, help="begin no case after these")
    commands.add_parser("report").add_argument("source", type=Path)
    got = parser.parse_args()
    if got.action == "error":
        error(got.model, got.target, got.tokens, got.texts, got.answers, got.alone)
    elif got.action == "decode":
        decode(got.target, got.quick, got.seconds)
    else:
        report(got.source)


if __name__ == "__main__":
    main()

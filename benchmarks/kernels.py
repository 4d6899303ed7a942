"""Attention over pages against MLX's own over contiguous arrays, on the default device.

    python benchmarks/kernels.py run OUT.json [--quick]     on the device
    python benchmarks/kernels.py report OUT.json docs       a table and a plot of it

Medians; each ratio is of two times taken in the same run. Inputs are fresh random numbers, and
small ones rotate among buffers that together exceed the device's caches. Calls follow each other by
data: the output of one is the query of the next. GB/s are useful bytes: each live key and value
once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlxrewrite.kernels import calls, launch, ops
from mlxrewrite.kernels.ops import Pool, Ragged

BLOCK = 16
HEADS = ((32, 8), (16, 8), (8, 4), (64, 8))
DIMS = (128, 64, 256)
BATCHES = (1, 8, 32, 64, 128)
LENGTHS = (1024, 4096, 16384)
CACHES = 256 << 20  # more than any device's caches
MOST = 9 << 30  # of keys and values in one case
REPEATS = 5


def timed(*builds: Callable[[], Any], count: int) -> list[float]:
    """Seconds of one of the `count` calls in each graph: medians over runs in turn, of graphs that
    are built before the clock runs."""
    times: list[list[float]] = [[] for _ in builds]
    for i in range(REPEATS + 2):
        for build, taken in zip(builds, times, strict=True):
            made = build()
            mx.synchronize()
            begin = time.perf_counter()
            mx.eval(made)
            mx.synchronize()
            if i >= 2:
                taken.append((time.perf_counter() - begin) / count)
    return [statistics.median(taken) for taken in times]


def random(*shape: int) -> mx.array:
    made = mx.random.normal(shape, mx.bfloat16)
    mx.eval(made)
    return made


def copy_rate() -> float:
    """GB/s of an elementwise operation, read and written."""
    source = random(1 << 29)
    (seconds,) = timed(lambda: source + 1, count=1)
    return 2 * source.nbytes / seconds / 1e9


def sequence_lengths(batch: int, length: int, mixed: bool) -> list[int]:
    if not mixed:
        return [length] * batch
    rng = np.random.default_rng(batch + length)
    return [length, *rng.integers(length // 8, length + 1, batch - 1).tolist()]


def pages(lengths: list[int], kv_heads: int, dim: int, rows: list[int]) -> tuple[Pool, Ragged]:
    counts = [-(-length // BLOCK) for length in lengths]
    order = np.random.default_rng(0).permutation(sum(counts)).tolist()
    tables, taken = [], 0
    for count in counts:
        tables.append(order[taken : taken + count])
        taken += count
    pool = ops.new_pool(
        num_blocks=1,
        block_size=BLOCK,
        kv_heads=kv_heads,
        key_dim=dim,
        value_dim=dim,
        dtype=mx.bfloat16,
    )
    shape = (sum(counts), BLOCK, kv_heads, dim)
    pool = replace(pool, keys=random(*shape), values=random(*shape))
    return pool, Ragged.build(rows, lengths, tables, BLOCK)


def decode(
    batch: int, length: int, heads: tuple[int, int], dim: int, mixed: bool, baseline: bool = True
) -> dict[str, Any]:
    lengths = sequence_lengths(batch, length, mixed)
    useful = 2 * sum(lengths) * heads[1] * dim * 2
    sets = max(1, min(8, -(-CACHES // useful)))
    count = max(sets, min(24, int(2e9 / useful) + 2))
    scale = dim**-0.5
    made = [pages(lengths, heads[1], dim, [1] * batch) for _ in range(sets)]

    def paged() -> mx.array:
        out = random(batch, heads[0], dim)
        for i in range(count):
            pool, ragged = made[i % sets]
            out, pool = ops.attention(out, pool, ragged, scale=scale)
            made[i % sets] = (pool, ragged)
        return out

    result: dict[str, Any] = {
        "kind": "decode",
        "batch": batch,
        "length": length,
        "heads": heads,
        "dim": dim,
        "mixed": mixed,
        "useful": useful,
    }
    if not baseline:
        (result["paged_s"],) = timed(paged, count=count)
        result["paged_gbs"] = useful / result["paged_s"] / 1e9
        return result
    top = max(lengths)
    arrays = [
        (random(batch, heads[1], top, dim), random(batch, heads[1], top, dim)) for _ in range(sets)
    ]
    mask = None
    if mixed:
        mask = (mx.arange(top)[None] < mx.array(lengths)[:, None])[:, None, None]
        mx.eval(mask)

    def contiguous() -> mx.array:
        out = random(batch, heads[0], 1, dim)
        for i in range(count):
            keys, values = arrays[i % sets]
            out = mx.fast.scaled_dot_product_attention(out, keys, values, scale=scale, mask=mask)
        return out

    result["paged_s"], result["mlx_s"] = timed(paged, contiguous, count=count)
    result["paged_gbs"] = useful / result["paged_s"] / 1e9
    result["mlx_gbs"] = useful / result["mlx_s"] / 1e9
    result["ratio"] = result["mlx_s"] / result["paged_s"]
    return result


def prefill(
    heads: tuple[int, int],
    dim: int,
    rows: int,
    length: int,
    decoding: int,
    window: int | None = None,
) -> dict[str, Any]:
    """`rows` rows that end at `length`, beside `decoding` sequences of one row."""
    lengths = [length] * (decoding + 1)
    scale, count = dim**-0.5, 4
    pool, ragged = pages(lengths, heads[1], dim, [1] * decoding + [rows])
    queries = random(decoding + rows, heads[0], dim)
    result: dict[str, Any] = {
        "kind": "prefill",
        "heads": heads,
        "dim": dim,
        "rows": rows,
        "length": length,
        "decoding": decoding,
        "window": window,
    }

    def paged(route: ops.Route | None) -> Callable[[], mx.array]:
        def build() -> mx.array:
            nonlocal pool
            out = queries
            for _ in range(count):
                out, pool = ops.attention(
                    out, pool, ragged, scale=scale, window=window, route=route
                )
            return out

        return build

    routes: tuple[ops.Route | None, ...] = (
        (None, "kernel") if decoding else (None, "kernel", "gathered")
    )
    keys, values = (random(1, heads[1], length, dim) for _ in range(2))
    many = [random(decoding, heads[1], length, dim) for _ in range(2)] if decoding else []
    mask: Any = "causal"
    if window is not None:
        mine, theirs = mx.arange(length - rows, length)[:, None], mx.arange(length)[None]
        mask = (theirs <= mine) & (theirs > mine - window)
        mx.eval(mask)

    def contiguous() -> list[mx.array]:
        outs = []
        long, single = random(1, heads[0], rows, dim), random(decoding or 1, heads[0], 1, dim)
        for _ in range(count):
            long = mx.fast.scaled_dot_product_attention(long, keys, values, scale=scale, mask=mask)
            if many:
                single = mx.fast.scaled_dot_product_attention(single, *many, scale=scale)
        outs += [long, single]
        return outs

    names = [f"{route or 'chosen'}_s" for route in routes]
    times = timed(*(paged(route) for route in routes), contiguous, count=count)
    result.update(zip([*names, "mlx_s"], times, strict=True))
    result["ratio"] = result["mlx_s"] / result["chosen_s"]
    return result


def write(batch: int) -> dict[str, Any]:
    """A step's rows into a pool of 2 GiB, and what memory that takes beyond it."""
    pool = ops.new_pool(
        num_blocks=32768,
        block_size=BLOCK,
        kv_heads=8,
        key_dim=128,
        value_dim=128,
        dtype=mx.bfloat16,
    )
    mx.eval(pool.arrays())
    tables = [[i] for i in range(batch)]
    ragged = Ragged.build([1] * batch, [5] * batch, tables, BLOCK)
    keys, values = random(batch, 8, 128), random(batch, 8, 128)
    count = 20
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()

    def build() -> mx.array:
        nonlocal pool
        for _ in range(count):
            pool = ops.write_kv(keys, values, pool, ragged)
        return pool.token

    return {
        "kind": "write",
        "batch": batch,
        "paged_s": timed(build, count=count)[0],
        "beyond_pool": mx.get_peak_memory() - before,
        "pool": pool.nbytes,
    }


def device() -> str:
    info = mx.device_info() if hasattr(mx, "device_info") else {}
    return f"{launch.active()}, {info.get('device_name', 'unknown')}"


def run(target: Path, quick: bool, seconds: float, known: Path | None) -> None:
    # Kernels that no case calls need not be compiled here.
    calls.prepare = lambda *args: None  # type: ignore[assignment]
    begin = time.perf_counter()
    results: list[dict[str, Any]] = (
        [] if known is None else json.loads(known.read_text())["results"]
    )
    there = {identity(result) for result in results}
    chosen = [case for case in cases(quick) if called(case) not in there]
    if known is not None:  # as many shapes as time allows: the middle length first
        chosen.sort(key=lambda case: called(case)[2] != 4096)
    made: dict[str, Any] = {
        "device": device(),
        "mlx": mx.__version__,
        "copy_gbs": copy_rate(),
        "results": results,
    }
    print(made["device"], f"copy {made['copy_gbs']:.0f} GB/s", flush=True)

    def keep(result: dict[str, Any]) -> None:
        results.append(result)
        target.write_text(json.dumps(made, indent=1))
        mx.clear_cache()
        print(line(result), flush=True)

    for batch in (1, 32, 128) if known is None else ():
        keep(write(batch))
    for case in chosen:
        if time.perf_counter() - begin > seconds:
            print("out of time")
            break
        keep(case())


def identity(result: dict[str, Any]) -> tuple[Any, ...]:
    """What a result was measured with: kind and arguments, the third of them a length."""
    names = {
        "decode": ("batch", "length", "heads", "dim", "mixed"),
        "prefill": ("rows", "length", "heads", "dim", "decoding", "window"),
    }.get(result["kind"], ("batch",))
    found = (result["kind"], *(result[name] for name in names))
    return tuple(tuple(part) if isinstance(part, list) else part for part in found)


def called(case: partial[dict[str, Any]]) -> tuple[Any, ...]:
    """The identity of the result that a case will give."""
    if case.func is decode:
        return ("decode", *case.args)
    heads, dim, rows, length, decoding, window = (*case.args, None)[:6]
    return ("prefill", rows, length, heads, dim, decoding, window)


def cases(quick: bool) -> Iterator[partial[dict[str, Any]]]:
    """The grid, the most telling part first."""
    shapes = [(heads, dim) for dim in DIMS for heads in HEADS][: 1 if quick else None]
    for mixed in (False, True):
        for heads, dim in shapes:
            for length, batch in itertools.product(LENGTHS, BATCHES):
                need = 4 * batch * length * heads[1] * dim
                if need <= MOST and not (mixed and batch == 1):
                    yield partial(decode, batch, length, heads, dim, mixed)
            if not mixed:
                yield partial(prefill, heads, dim, 4096, 4096, 0)
                yield partial(prefill, heads, dim, 2048, 4096, 32)
    for rows, decoding, window in ((512, 0, None), (64, 0, None), (4096, 0, 512)):
        yield partial(prefill, (32, 8), 128, rows, 4096, decoding, window)


def line(r: dict[str, Any]) -> str:
    if r["kind"] == "write":
        return (
            f"write B{r['batch']}: {r['paged_s'] * 1e6:.1f} us, {r['beyond_pool'] / 1e6:.1f} MB "
            f"beyond a pool of {r['pool'] / 1e9:.1f} GB"
        )
    heads = f"{r['heads'][0]}/{r['heads'][1]} D{r['dim']}"
    if r["kind"] == "decode":
        mixed = " mixed" if r["mixed"] else ""
        text = f"decode {heads} B{r['batch']} N{r['length']}{mixed}: {r['paged_gbs']:.0f} GB/s"
        if "ratio" in r:
            text += f", MLX {r['mlx_gbs']:.0f}, {r['ratio']:.2f}x"
        return text
    times = ", ".join(f"{k[:-2]} {v * 1e3:.2f} ms" for k, v in r.items() if k.endswith("_s"))
    extra = f" window {r['window']}" if r["window"] else ""
    return (
        f"prefill {heads} {r['rows']} of {r['length']} beside {r['decoding']}{extra}: {times}, "
        f"{r['ratio']:.2f}x"
    )


# ------------------------------------------------------------------ report


def report(source: Path, folder: Path) -> None:
    """kernels.md's table and plot, from what a device measured."""
    made = json.loads(source.read_text())
    rows = [
        f"Measured with MLX {made['mlx']}, {made['device']}; elementwise copy "
        f"{made['copy_gbs']:.0f} GB/s. GB/s of useful keys and values; x: MLX's time over ours.",
        "",
    ]
    decodes = [r for r in made["results"] if r["kind"] == "decode"]
    for mixed in (False, True):
        rows += [
            f"### Decode, {'mixed' if mixed else 'equal'} lengths",
            "",
            "| heads | dim | batch | " + " | ".join(f"{n} keys" for n in LENGTHS) + " |",
            "| --- | --- | --- |" + " --- |" * len(LENGTHS),
        ]
        groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
        for r in decodes:
            if r["mixed"] == mixed:
                groups.setdefault((*r["heads"], r["dim"], r["batch"]), {})[r["length"]] = r
        for (q, kv, dim, batch), found in groups.items():
            cells = [
                f"{found[n]['paged_gbs']:.0f} ({found[n]['mlx_gbs']:.0f}, {found[n]['ratio']:.1f}x)"
                if n in found
                else ""
                for n in LENGTHS
            ]
            rows.append(f"| {q}/{kv} | {dim} | {batch} | " + " | ".join(cells) + " |")
        rows.append("")
    rows += [
        "### Prefill",
        "",
        "Milliseconds; x: MLX's time over that of the chosen route.",
        "",
        "| heads | dim | rows | keys | beside | window | chosen | kernel | gathered | MLX | x |",
        "| --- |" + " --- |" * 10,
    ]
    for r in made["results"]:
        if r["kind"] == "prefill":
            ms = [
                f"{r[k] * 1e3:.2f}" if k in r else ""
                for k in ("chosen_s", "kernel_s", "gathered_s", "mlx_s")
            ]
            rows.append(
                f"| {r['heads'][0]}/{r['heads'][1]} | {r['dim']} | {r['rows']} | {r['length']} | "
                f"{r['decoding']} | {r['window'] or ''} | {' | '.join(ms)} | {r['ratio']:.2f} |"
            )
    rows += ["", "### Writes", ""]
    rows += [f"- {line(r)}" for r in made["results"] if r["kind"] == "write"]
    (folder / "kernels_measured.md").write_text("# Kernels, measured\n\n" + "\n".join(rows) + "\n")
    (folder / "kernels_measured.json").write_text(json.dumps(made, indent=1) + "\n")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dims = sorted({r["dim"] for r in decodes})
    figure, axes = pyplot.subplots(
        1, len(dims), figsize=(5 * len(dims), 4.5), sharey=True, squeeze=False
    )
    for axis, dim in zip(axes[0], dims, strict=True):
        for color, heads in zip(("C0", "C1", "C2", "C3"), HEADS, strict=True):
            points = sorted(
                (r["batch"] * r["length"], r["paged_gbs"], r["mlx_gbs"])
                for r in decodes
                if r["dim"] == dim and tuple(r["heads"]) == heads and not r["mixed"]
            )
            x = [p[0] for p in points]
            axis.plot(x, [p[1] for p in points], "o-", color=color, label=f"{heads[0]}/{heads[1]}")
            axis.plot(x, [p[2] for p in points], "x:", color=color)
        axis.axhline(made["copy_gbs"], color="gray", linewidth=1)
        axis.set(xscale="log", title=f"head dim {dim}", xlabel="batch x keys")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("GB/s of useful keys and values")
    axes[0][0].legend(title="pages (solid), MLX (dotted)")
    figure.suptitle(f"{made['device']}; gray: elementwise copy", fontsize=10)
    figure.tight_layout()
    figure.savefig(folder / "kernels_measured.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs"))
    parser.add_argument("--known", type=Path, help="results to complete, of the same device")
    parser.add_argument("--quick", action="store_true", help="one kind of heads only")
    parser.add_argument("--seconds", type=float, default=400, help="begin no case after these")
    got = parser.parse_args()
    if got.action == "run":
        run(got.file, got.quick, got.seconds, got.known)
    else:
        report(got.file, got.folder)


if __name__ == "__main__":
    main()

"""Seeded bugs: each is one change to the text of a real kernel or of a probe, and the test says who
sees it: the runner (and as what), the static check, or only the float64 reference."""

from __future__ import annotations

import re
from dataclasses import dataclass

import kernel_cases as cases
import mlx.core as mx
import pytest
from kernel_cases import Case
from mlxrewrite.kernels import policy
from mlxrewrite.kernels.dialects.cpu import KernelError, Options, metal_kernel, symbols
from mlxrewrite.kernels.dialects.cpu.static import check
from runner_cases import hostile, recorded

# What the runner says, and where: the words of its report.
BOUNDS = r"out-of-bounds|out of bounds"
RACE = "race on"
UNINITIALISED = "uninitialised"
DIVERGENCE = "divergent"
LIMIT = "over the limit"
INPUT = "an input, at byte"
MISALIGNED = "misaligned"
ARITHMETIC = "division by zero|overflow of"
COMPILER = "does not compile"
# Others who see it.
STATIC = "static check"
REFERENCE = "reference"

GROUP_BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SIMD_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"
ROWS = Case((1, 1, 1), (1, 37, 200), query_heads=8, dtype="float16")
SINKS = Case((1, 1), (9, 70), query_heads=4, window=20, sinks=True)
MANY = Case((1, 5, 35), (9, 37, 70), key_dim=32, value_dim=32, window=20, dtype="bfloat16")
PARTS = Case((9,), (40,), query_heads=2, kv_heads=1, key_dim=32, value_dim=256)
STAGED = Case((1, 5, 35), (9, 37, 70), key_dim=32, value_dim=32, window=50, dtype="bfloat16")
HEADS = Case((1,), (20,), query_heads=8, kv_heads=8)
CODES = Case((1, 1), (9, 300), query_heads=6, kv_heads=3, dtype="float16", bits=4)
MANY_CODES = Case((1, 9), (9, 30), dtype="float16", bits=8)
SPLIT = Case((1, 1), (130, 70), query_heads=2, kv_heads=1, sinks=True)


@dataclass(frozen=True)
class Bug:
    """`old` becomes `new` in the kernels of `template`. seen_by: words of the runner's report, or
    who else."""

    template: str
    case: Case
    old: str
    new: str
    seen_by: str
    split: bool = False


BUGS = {
    # Single rows.
    "decode: no barrier before weights are read": Bug(
        "decode", ROWS, SIMD_BARRIER, "", RACE + "|" + UNINITIALISED
    ),
    "decode: weights overwritten while others read": Bug(
        "decode",
        ROWS,
        f"    }}\n  }}\n  {SIMD_BARRIER}\n}}",
        "    }\n  }\n}",
        RACE,
    ),
    "decode: simdgroups merged without barrier": Bug(
        "decode", ROWS, GROUP_BARRIER, "", RACE + "|" + UNINITIALISED
    ),
    "decode: a barrier that orders no memory": Bug(
        "decode", ROWS, GROUP_BARRIER, "threadgroup_barrier(mem_flags::mem_none);", RACE
    ),
    "decode: a barrier for the wrong memory": Bug(
        "decode", ROWS, GROUP_BARRIER, "threadgroup_barrier(mem_flags::mem_device);", RACE
    ),
    "decode: a simdgroup barrier for a threadgroup": Bug(
        "decode", ROWS, GROUP_BARRIER, SIMD_BARRIER, RACE + "|" + UNINITIALISED
    ),
    "decode: a barrier that some lanes skip": Bug(
        "decode",
        ROWS,
        GROUP_BARRIER,
        f"if (lane < 16) {{ {GROUP_BARRIER} }}",
        DIVERGENCE + "|" + RACE,
    ),
    "decode: a simdgroup that returns early": Bug(
        "decode",
        ROWS,
        GROUP_BARRIER,
        f"if (simdgroup == 1) {{ return; }} {GROUP_BARRIER}",
        DIVERGENCE,
    ),
    "decode: a simd function under a lane's condition": Bug(
        "decode", ROWS, "if (simd_any(higher)) {", "if (higher) {", DIVERGENCE
    ),
    "decode: lanes that leave the loop early": Bug(
        "decode",
        ROWS,
        "  float score[HEADS];",
        "  if (!seen) { break; }\n  float score[HEADS];",
        DIVERGENCE,
    ),
    "decode: a key too many": Bug(
        "decode", ROWS, "tile + mine <= high;", "tile + mine <= high + 1;", REFERENCE
    ),
    "decode: the oldest key of the window left out": Bug(
        "decode", SINKS, "tile + mine >= low &&", "tile + mine > low &&", REFERENCE
    ),
    "decode: masked with 0": Bug(
        "decode",
        ROWS,
        "score[h] = seen ? score[h] : -INFINITY;",
        "score[h] = seen ? score[h] : 0.0f;",
        REFERENCE,
    ),
    "decode: blocks behind the last looked up": Bug(
        "decode",
        ROWS,
        "blocks[i] = table[clamp(tile / BLOCK + i, low / BLOCK, high / BLOCK)];",
        "blocks[i] = table[tile / BLOCK + i + 1];",
        BOUNDS,
    ),
    "decode: rows behind the last read": Bug(
        "decode",
        ROWS,
        "clamp(tile + step * ROWS + int(lane) / LANES, low, high)",
        "tile + step * ROWS + int(lane) / LANES",
        REFERENCE,
    ),
    "decode: a query row too far": Bug(
        "decode", ROWS, "queries + (size_t(row) *", "queries + (size_t(row + 1) *", BOUNDS
    ),
    "decode: a key head too far": Bug(
        "decode",
        ROWS,
        "+ (key % BLOCK * HEADS + head)",
        "+ (key % BLOCK * HEADS + head + 1)",
        BOUNDS + "|" + REFERENCE,
    ),
    "decode: a query head taken for another": Bug(
        "decode",
        ROWS,
        "min(chunk * HEADS + h, GROUP - 1)",
        "min(chunk * HEADS, GROUP - 1)",
        REFERENCE,
    ),
    "decode: sums not rescaled": Bug("decode", ROWS, "total[h] *= factor;", "", REFERENCE),
    "decode: sums not merged over lanes": Bug(
        "decode", ROWS, "distance < 32; distance *= 2", "distance < 16; distance *= 2", REFERENCE
    ),
    "decode: an array of threadgroup memory overrun": Bug(
        "decode",
        ROWS,
        "merge_values[(simdgroup * MERGED + h)",
        "merge_values[((simdgroup + 1) * MERGED + h)",
        BOUNDS,
    ),
    "decode: an array of a thread overrun": Bug(
        "decode", ROWS, "sums[min(first + h, HEADS - 1)]", "sums[first + h + lane]", BOUNDS
    ),
    "decode: a misaligned vector": Bug(
        "decode",
        ROWS,
        "load_words<WORDS>(row + vector * WORDS)",
        "load_words<WORDS>(row + vector * WORDS + 1)",
        MISALIGNED,
    ),
    "decode: all query heads write one output": Bug(
        "decode",
        ROWS,
        "* QUERY_HEADS + kv_head * GROUP + head;\n      output",
        "* QUERY_HEADS + kv_head * GROUP;\n      output",
        RACE,
    ),
    "decode: an output left out": Bug(
        "decode",
        ROWS,
        "at < CHUNKS * MERGED * VALUE_DIM;",
        "at < CHUNKS * MERGED * VALUE_DIM - 1;",
        REFERENCE,
    ),
    "decode: a write to the queries": Bug(
        "decode",
        ROWS,
        "float best[HEADS];",
        "float best[HEADS]; const_cast<device Q*>(queries)[lane] = Q(0.0f);",
        INPUT,
    ),
    "decode: every threadgroup writes the token": Bug(
        "decode", ROWS, "threadgroup_position_in_grid.x == 0 && ", "", RACE
    ),
    "decode: too much threadgroup memory": Bug(
        "decode",
        ROWS,
        "threadgroup float merge_sum[SIMDGROUPS * HEADS];",
        "threadgroup float merge_sum[SIMDGROUPS * HEADS];\nthreadgroup float more[8192];"
        " more[0] = 0.0f;",
        LIMIT,
    ),
    "decode: a variable that is not set": Bug(
        "decode", ROWS, "  best[h] = LOWEST;\n", "", REFERENCE
    ),
    "decode: a double": Bug(
        "decode",
        ROWS,
        "simd_sum(total[h]) * (1.0f / COPIES)",
        "simd_sum(total[h]) * (1.0 / COPIES)",
        STATIC,
    ),
    "decode: a pointer without address space": Bug(
        "decode", ROWS, "const device int* table = block", "const int* table = block", STATIC
    ),
    "decode: a helper's pointer without address space": Bug(
        "decode",
        ROWS,
        "thread int* blocks, const device int* table,",
        "thread int* blocks, const int* table,",
        STATIC,
    ),
    # Many rows.
    "tiled: scores read before they are written": Bug(
        "tiled", PARTS, GROUP_BARRIER, "", RACE + "|" + UNINITIALISED
    ),
    "tiled: scores overwritten while others read": Bug(
        "tiled",
        PARTS,
        f"    }}\n  }}\n  {GROUP_BARRIER}\n\n  float raised",
        "    }\n  }\n\n  float raised",
        RACE,
    ),
    "tiled: rows see what comes after them": Bug(
        "tiled", MANY, "&& key <= min(high, last_key[i / 2])", "&& key <= high", REFERENCE
    ),
    "tiled: rows see past their window": Bug(
        "tiled", MANY, "key >= max(low, first_key[i / 2])", "key >= low", REFERENCE
    ),
    "tiled: rows past the end are written": Bug(
        "tiled", MANY, "  if (mine[i] < packed_end) {", "  {", BOUNDS + "|" + RACE
    ),
    "tiled: a matrix product in half of the lanes": Bug(
        "tiled",
        MANY,
        "multiply_add(partial[n]",
        "if (lane < 16) multiply_add(partial[n]",
        DIVERGENCE,
    ),
    "tiled: the wrong lanes exchange": Bug(
        "tiled", MANY, "#define ROW_LANES_B 8", "#define ROW_LANES_B 16", REFERENCE
    ),
    "tiled: the wrong column of the keys": Bug(
        "tiled",
        MANY,
        "float(rows[0][at + 8]), float(rows[1][at + 8])",
        "float(rows[0][at + 7]), float(rows[1][at + 7])",
        REFERENCE,
    ),
    "tiled: rows of the values out of order": Bug(
        "tiled",
        MANY,
        "return piece_row(lane) + 8 * i;",
        "return piece_row(lane) + 4 * i;",
        REFERENCE,
    ),
    "tiled: exchanged scores in too little memory": Bug(
        "tiled",
        PARTS,
        "exchanged[ROW_TILES * 16 * TILE];",
        "exchanged[ROW_TILES * 8 * TILE];",
        BOUNDS,
    ),
    # Many rows, tiles in threadgroup memory.
    "staged: tiles read before they are there": Bug(
        "staged", STAGED, f"stage_wait<0>();\n    {GROUP_BARRIER}", "", RACE + "|" + UNINITIALISED
    ),
    "staged: weights taken before they are handed out": Bug(
        "staged",
        STAGED,
        f"  {GROUP_BARRIER}\n  raising = false;",
        "  raising = false;",
        RACE + "|" + UNINITIALISED,
    ),
    "staged: the next tile over the one in use": Bug(
        "staged",
        STAGED,
        "key_tiles + (1 - buffer) * KEY_TILE",
        "key_tiles + buffer * KEY_TILE",
        RACE,
    ),
    "staged: one tile of memory for two": Bug(
        "staged", STAGED, "key_tiles[STAGES * KEY_TILE]", "key_tiles[KEY_TILE]", BOUNDS
    ),
    "staged: the blocks of the tile before": Bug(
        "staged", STAGED, "    block = next_block;\n", "", REFERENCE + "|" + BOUNDS
    ),
    "staged: rows see what comes after them": Bug(
        "staged", STAGED, "&& key <= min(high, last_key[i / 2])", "&& key <= high", REFERENCE
    ),
    "staged: rows see past their window": Bug(
        "staged", STAGED, "key >= max(low, first_key[i / 2])", "key >= low", REFERENCE
    ),
    "staged: rows past the end are written": Bug(
        "staged", STAGED, "  if (mine < packed_end) {", "  {", BOUNDS + "|" + RACE
    ),
    "staged: keys outside the item are loaded": Bug(
        "staged",
        STAGED,
        "const int key = clamp(first + row, low, high);",
        "const int key = first + row;",
        REFERENCE + "|" + BOUNDS,
    ),
    "staged: a shuffle that some lanes skip": Bug(
        "staged",
        STAGED,
        "    const int key = clamp(first + row, low, high);\n",
        "    const int key = clamp(first + row, low, high);\n    if (row % 4 == 3) { continue; }\n",
        DIVERGENCE,
    ),
    # The reduction.
    "reduce: no barrier": Bug(
        "reduce", SPLIT, GROUP_BARRIER, "", RACE + "|" + UNINITIALISED, split=True
    ),
    "reduce: sinks left out": Bug(
        "reduce", SPLIT, "weight += fast::exp2(sink - highest);", "", REFERENCE, split=True
    ),
    "reduce: a simd function in a loop of uneven length": Bug(
        "reduce",
        SPLIT,
        "  highest = max(highest, partial_stats[(i * HEADS + head) * 2]);",
        "  highest = simd_max(max(highest, partial_stats[(i * HEADS + head) * 2]));",
        DIVERGENCE,
        split=True,
    ),
    "reduce: parts of the next row": Bug(
        "reduce",
        SPLIT,
        "row_items[row + 1];",
        "row_items[row + 1] + 1;",
        BOUNDS + "|" + REFERENCE,
        split=True,
    ),
    # The write.
    "write: a slot too far": Bug(
        "write", ROWS, "slots[row]);", "slots[row] + 1);", REFERENCE + "|" + BOUNDS
    ),
    "write: an element too many": Bug(
        "write", ROWS, "i < KEYS;", "i <= KEYS;", BOUNDS + "|" + RACE
    ),
    "write: all rows into one slot": Bug("write", ROWS, "slots[row]);", "slots[0]);", RACE),
    "write: threads that overlap": Bug(
        "write", HEADS, "i += THREADS * KEY_UNIT", "i += THREADS", RACE
    ),
    "write: into the rows": Bug(
        "write",
        ROWS,
        "device P* key_target = const_cast<device P*>(key_pool) + slot * KEYS;",
        "device P* key_target = const_cast<device P*>(keys) + slot % 2;",
        INPUT,
    ),
    "write: const cast away without a word": Bug(
        "write", ROWS, "const_cast<device P*>(key_pool) + slot", "key_pool + slot", COMPILER
    ),
    # Pools of codes.
    "decode: codes from the other end of a word": Bug(
        "decode", CODES, "word >> (BITS * i)", "word >> (BITS * (32 / BITS - 1 - i))", REFERENCE
    ),
    "decode: pairs of the next head": Bug(
        "decode",
        CODES,
        "(head * BLOCK + key % BLOCK) * ROW",
        "((head + 1) * BLOCK + key % BLOCK) * ROW",
        REFERENCE + "|" + BOUNDS,
    ),
    "decode: pairs of the next keys": Bug(
        "decode",
        CODES,
        "key_pairs, key_words, blocks, kv_head, tile + stride,",
        "key_pairs, key_words, blocks, kv_head, tile + stride + 1,",
        REFERENCE,
    ),
    "quantize: the range of half a group": Bug(
        "quantize", CODES, "distance < LANES;", "distance < LANES / 2;", REFERENCE
    ),
    "quantize: lanes that leave before the shuffles": Bug(
        "quantize",
        CODES,
        "const int word = min(",
        "if (first + thread_index >= WORDS) { break; }\n    const int word = min(",
        DIVERGENCE,
    ),
    "quantize: a row too far": Bug(
        "quantize",
        CODES,
        "const int row = slot % BLOCK;",
        "const int row = (slot + 1) % BLOCK;",
        REFERENCE,
    ),
    "quantize: all rows into one slot": Bug("quantize", CODES, "slots[row],", "slots[0],", RACE),
    "quantize: a word too many": Bug(
        "quantize", CODES, "thread_index < WORDS)", "thread_index <= WORDS)", RACE + "|" + BOUNDS
    ),
    "dequantize: pairs of the next group": Bug(
        "dequantize",
        MANY_CODES,
        "word % ROW / LANES * PAIR);",
        "word % ROW / LANES * PAIR + PAIR);",
        REFERENCE + "|" + BOUNDS,
    ),
    "dequantize: an element too many": Bug(
        "dequantize", MANY_CODES, "word < HEADS * ROW;", "word <= HEADS * ROW;", BOUNDS + "|" + RACE
    ),
    "dequantize: heads that overlap": Bug(
        "dequantize", MANY_CODES, "* length + position)", "* (length - 1) + position)", RACE
    ),
}


def outcome(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> str:
    """The runner's report, or who else sees the bug; "" if nobody does."""
    if bug.split:
        monkeypatch.setitem(policy.LEAST_SPLIT, "decode", 32)
        monkeypatch.setitem(policy.THREADGROUPS, "runner", 1000)
    if bug.template == "tiled":
        monkeypatch.setattr(policy, "staged_spec", lambda *_, **__: None)
    if bug.template == "staged":
        cases.staged_as(monkeypatch, row_tiles=2, parts=2, tile=32, stages=2)
    made = hostile(bug.case)
    with recorded(bug.template, bug.old, bug.new) as launches:
        try:
            out, pool = cases.run(made, None if bug.template == "dequantize" else "kernel")
            mx.eval(out, *pool.arrays())
        except KernelError as error:
            return str(error)
    ran = [one for one in launches if one.kernel.name.split("_")[0] == bug.template]
    assert ran, f"no {bug.template} kernel ran"
    # NaN is no less than anything.
    if not cases.error(out, cases.exact(made)) < cases.TOLERANCE[bug.case.dtype]:
        return REFERENCE
    return STATIC if any(check(**one.described) for one in ran) else ""


def first_of_each(bugs: dict[str, Bug]) -> set[str]:
    """One bug of each template and way to be seen: the others are slow together."""
    found: dict[tuple[str, str], str] = {}
    for name, bug in bugs.items():
        found.setdefault((bug.template, bug.seen_by), name)
    return set(found.values())


QUICK = first_of_each(BUGS)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in BUGS],
)
def test_bug_in_a_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bug = BUGS[name]
    report = outcome(bug, monkeypatch)
    assert re.search(bug.seen_by, report), report or "nobody saw it"


# ---- probes: what no real kernel has -------------------------------------------------------------
I = "uint i = thread_position_in_grid.x; "  # noqa: E741


@dataclass(frozen=True)
class Probe:
    """A body with float inputs a[64], b[64] (b may be written) and float outputs o[64], p[64]."""

    body: str
    seen_by: str = ""
    header: str = ""
    grid: int = 64
    threads: int = 64
    check: bool = True
    lockstep: bool = False


PROBES = {
    # Legal, and not to be reported.
    "a branch that all lanes of a simdgroup take": Probe(
        I + "float v = 0.0f; if (simdgroup_index_in_threadgroup == 0) { v = simd_sum(1.0f); }"
        " o[i] = v;"
    ),
    "an element of one's own": Probe(
        I + "threadgroup float s[64]; s[i] = a[i]; s[i] = s[i] + 1.0f; o[i] = s[i];"
    ),
    "neighbours after a simdgroup barrier": Probe(
        I + "threadgroup float s[64]; s[i] = a[i]; simdgroup_barrier(mem_flags::mem_threadgroup);"
        " o[i] = s[i ^ 1];"
    ),
    "device memory after a barrier": Probe(
        I + "o[i] = a[i]; threadgroup_barrier(mem_flags::mem_device); p[i] = o[63 - i];"
    ),
    "atomics": Probe(
        I + "threadgroup atomic_uint s; if (i == 0) { atomic_store_explicit(&s, 0u,"
        " memory_order_relaxed); } threadgroup_barrier(mem_flags::mem_threadgroup);"
        " atomic_fetch_add_explicit(&s, 2u, memory_order_relaxed);"
        " threadgroup_barrier(mem_flags::mem_threadgroup);"
        " o[i] = float(atomic_load_explicit(&s, memory_order_relaxed));"
    ),
    "bytes of one word": Probe(
        I + "threadgroup uchar s[64]; s[i] = uchar(i);"
        " threadgroup_barrier(mem_flags::mem_threadgroup); o[i] = float(s[63 - i]);"
    ),
    "a shorter last threadgroup": Probe(I + "o[i] = simd_sum(a[i]);", grid=40, threads=32),
    "lanes in step": Probe(
        I + "threadgroup float s[64]; s[i] = a[i]; simd_sum(1.0f); o[i] = s[i ^ 1];", lockstep=True
    ),
    # Races.
    "lanes not in step": Probe(
        I + "threadgroup float s[64]; s[i] = a[i]; simd_sum(1.0f); o[i] = s[i ^ 1];",
        RACE + "|" + UNINITIALISED,
    ),
    "device memory after a threadgroup barrier": Probe(
        I + "o[i] = a[i]; threadgroup_barrier(mem_flags::mem_threadgroup); p[i] = o[63 - i];", RACE
    ),
    "atomic and plain": Probe(
        I + "threadgroup atomic_uint s; if (i == 0) { atomic_store_explicit(&s, 0u,"
        " memory_order_relaxed); } threadgroup_barrier(mem_flags::mem_threadgroup);"
        " atomic_fetch_add_explicit(&s, 2u, memory_order_relaxed);"
        " o[i] = float(*reinterpret_cast<threadgroup uint*>(&s));",
        RACE,
    ),
    "threadgroups that read what others write": Probe(
        I + "o[i] = b[63 - i]; const_cast<device float*>(b)[i] = 1.0f;", RACE, threads=32
    ),
    "a sum in place": Probe(I + "o[0] += a[i];", RACE + "|" + UNINITIALISED),
    # Memory.
    "a struct copied past the end": Probe(
        I + "S s = reinterpret_cast<const device S*>(a)[i]; float v = 0.0f;"
        " for (int j = 0; j < 8; j++) { v += s.x[(i + j) % 8]; } o[i] = v;",
        BOUNDS,
        header="struct S { float x[8]; };\n",
    ),
    "a vector past the end": Probe(
        I + "float4 v = reinterpret_cast<const device float4*>(a)[i]; o[i] = v.x;", BOUNDS
    ),
    "past the end without checks": Probe(I + "o[i] = a[i * 4096 + 4096];", BOUNDS, check=False),
    "before the beginning": Probe(I + "o[i] = a[int(i) - 1];", BOUNDS),
    "past a threadgroup array, through a pointer": Probe(
        I + "threadgroup float s[64]; threadgroup float t[64]; t[i] = 0.0f;"
        " threadgroup float* at = s; at[i + 1] = t[i]; o[i] = 0.0f;",
        BOUNDS,
    ),
    "past an array of a thread": Probe(
        I + "float x[4] = {1.0f, 2.0f, 3.0f, 4.0f}; o[i] = x[i];", BOUNDS
    ),
    "a matrix past the end": Probe(
        I + "simdgroup_float8x8 m; simdgroup_load(m, a + 8, 8); simdgroup_store(m, o, 8);", BOUNDS
    ),
    "an atomic past the end": Probe(
        I + "atomic_fetch_add_explicit(reinterpret_cast<device atomic_float*>(o) + 64, 1.0f,"
        " memory_order_relaxed);",
        BOUNDS,
    ),
    "an output that is not written yet": Probe(I + "o[i] = p[i];", UNINITIALISED),
    "threadgroup memory through a pointer": Probe(
        I + "threadgroup float s[64]; threadgroup float* at = s + 1; o[i] = at[i % 8];",
        UNINITIALISED,
    ),
    "a misaligned half": Probe(
        I + "o[i] = float(*reinterpret_cast<const device half*>("
        "reinterpret_cast<const device uchar*>(a) + 1));",
        MISALIGNED,
    ),
    "more variables than a stack": Probe(
        I + "float x[90000]; for (int j = 0; j < 90000; j++) { x[j] = a[j % 64]; }"
        " o[i] = x[int(a[i]) * 7 % 90000];",
        "stack overflow",
    ),
    # Arithmetic.
    "division by zero": Probe(
        I + "int z = int(a[0]) - int(a[0]); o[i] = float(7 / z);", ARITHMETIC
    ),
    "an index over 31 bits": Probe(
        I + "int n = int(a[0] + 70000.0f); o[i] = float(n * n);", ARITHMETIC
    ),
    # Meetings.
    "a lane that is not there": Probe(
        I + "o[i] = simd_shuffle(a[i], 31);", "reads lane 31, which is not there", grid=40
    ),
    "a matrix in a short simdgroup": Probe(
        I + "simdgroup_float8x8 m(1.0f); simdgroup_multiply_accumulate(m, m, m, m);"
        " o[i] = m.thread_elements()[0];",
        "in a simdgroup of 8 threads",
        grid=40,
        threads=40,
    ),
    "two barriers for one": Probe(
        I + "if (i < 32) { threadgroup_barrier(mem_flags::mem_none); } else {\n"
        " threadgroup_barrier(mem_flags::mem_none); } o[i] = 0.0f;",
        DIVERGENCE,
    ),
    "one shuffle for another": Probe(
        I + "float v = a[i]; if (i % 2 == 0) { v = simd_shuffle_xor(v, 1); } else {\n"
        " v = simd_shuffle_xor(v, 2); } o[i] = v;",
        DIVERGENCE,
    ),
    "a loop without end": Probe(
        I + "float v = 1.0f; while (v > 0.0f) { o[i] = v; v = o[i] + a[i]; } p[i] = v;",
        "does not end",
    ),
}


@pytest.mark.parametrize("name", PROBES)
def test_probe(name: str) -> None:
    probe = PROBES[name]
    made = metal_kernel(
        "probe",
        ["a", "b"],
        ["o", "p"],
        probe.body,
        probe.header,
        mutable_inputs=["b"],
        check=probe.check,
        options=Options(lockstep=probe.lockstep),
    )
    report = ""
    try:
        made(
            inputs=[mx.ones((64,)), mx.zeros((64,))],
            grid=(probe.grid, 1, 1),
            threadgroup=(min(probe.threads, probe.grid), 1, 1),
            output_shapes=[(64,), (64,)],
            output_dtypes=[mx.float32, mx.float32],
        )
    except KernelError as error:
        report = str(error)
    assert re.search(probe.seen_by, report) if probe.seen_by else not report, report or "no report"


def test_reports_name_buffer_thread_and_line() -> None:
    made = metal_kernel(
        "probe",
        ["a"],
        ["o"],
        "uint i = thread_position_in_grid.x;\n\no[i] = value(a, i);",
        "// a helper\nMETAL_FUNC float value(const device float* p, uint i) {\n"
        "  return p[i + 63];\n}\n",
    )
    with pytest.raises(KernelError) as raised:
        made(
            inputs=[mx.ones((64,))],
            grid=(64, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(64,)],
            output_dtypes=[mx.float32],
        )
    report = str(raised.value)
    assert "out-of-bounds read of 4 bytes: byte offset 256 in buffer 'a' of 256 bytes" in report
    assert "[threadgroup (0,0,0) thread 1 simdgroup 0 lane 1]" in report
    if symbols.available():
        assert "at probe.metal:3, in value probe.header:3" in report

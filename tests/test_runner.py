"""The CPU runner: the text it executes is MLX's own, and kernels come out right."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kernel_cases as cases
import mlx.core as mx
import pytest
from mlxrewrite.kernels.dialects.cpu import CompileError, KernelError, Options, metal_kernel
from mlxrewrite.kernels.dialects.cpu.source import Input, signature
from runner_cases import recorded

# ---- the signature: what MLX itself prints while it exports a graph ------------------------------
SIGNATURES: dict[str, dict[str, Any]] = {
    "facts, scalar, constant, template": {
        "inputs": {
            "a": mx.zeros((64,), mx.float16),
            "b": mx.zeros((4,), mx.bfloat16),
            "s": mx.array(1.0),
        },
        "outputs": {"o": mx.float16},
        "source": "o[thread_position_in_grid.x] = a[0] * T(2) + b[0] + s + a_shape[0]"
        " + b_strides[0] + a_ndim; uint lane = thread_index_in_simdgroup;",
        "header": "// helpers\n",
        "template": [("T", mx.float16), ("D", 64), ("F", True)],
    },
    "two outputs": {
        "inputs": {"a": mx.zeros((8, 2), mx.int32)},
        "outputs": {"o": mx.int32, "p": mx.float32},
        "source": "o[threadgroup_position_in_grid.x] = a[0];",
    },
    "no attribute, atomic": {
        "inputs": {"a": mx.zeros((9,), mx.uint8)},
        "outputs": {"o": mx.float32},
        "source": "o[0] = a[0];",
        "template": [("N", -3)],
        "atomic_outputs": True,
    },
    "no attribute, facts": {
        "inputs": {"a": mx.zeros((9, 2), mx.uint32)},
        "outputs": {"o": mx.float32, "p": mx.int8},
        "source": "o[0] = a[a_strides[0]];",
    },
    "no attribute, two inputs with facts": {
        "inputs": {"a": mx.zeros((9, 2), mx.uint32), "b": mx.zeros((7,), mx.uint16)},
        "outputs": {"o": mx.float32},
        "source": "o[0] = a[a_shape[0]] + b_ndim;",
    },
    "names inside names": {
        "inputs": {"k": mx.zeros((3, 3), mx.bool_), "bb": mx.zeros((2, 3), mx.int64)},
        "outputs": {"o": mx.float32},
        "source": "int block_shape = 1; // grid_size\n"
        "o[simdgroup_index_in_threadgroup] = k[threads_per_threadgroup.x] + bb_shape[1];",
        "template": [("T", mx.bfloat16), ("U", mx.int32)],
    },
    "every type": {
        "inputs": {
            f"i{n}": mx.zeros((16,), dtype)
            for n, dtype in enumerate(
                (
                    mx.bool_,
                    mx.uint8,
                    mx.uint16,
                    mx.uint32,
                    mx.uint64,
                    mx.int8,
                    mx.int16,
                    mx.int32,
                    mx.int64,
                    mx.float16,
                    mx.bfloat16,
                    mx.float32,
                )
            )
        },
        "outputs": {"o": mx.uint64},
        "source": "o[thread_index_in_threadgroup] = i0[threads_per_simdgroup];",
    },
}


def printed_by_mlx(name: str, case: dict[str, Any], folder: Path) -> str:
    """MLX prints the kernel while a graph with it is exported, without a Metal back end."""
    made = mx.fast.metal_kernel(
        name=name,
        input_names=list(case["inputs"]),
        output_names=list(case["outputs"]),
        source=case["source"],
        header=case.get("header", ""),
        atomic_outputs=case.get("atomic_outputs", False),
    )

    def call(*arrays: mx.array) -> list[mx.array]:
        results: list[mx.array] = made(
            inputs=list(arrays),
            template=case.get("template", []),
            grid=(64, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(64,)] * len(case["outputs"]),
            output_dtypes=list(case["outputs"].values()),
            verbose=True,
        )
        return results

    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        before = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            mx.export_function(str(folder / "graph"), call, *case["inputs"].values())
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(before, 1)
            os.close(before)
        file.seek(0)
        text = file.read().decode()
    return text.split("```\n", 1)[1].rsplit("\n```", 1)[0]


def ours(name: str, case: dict[str, Any]) -> str:
    return signature(
        name=name,
        inputs=[Input.of(key, array) for key, array in case["inputs"].items()],
        output_names=list(case["outputs"]),
        output_dtypes=list(case["outputs"].values()),
        source=case["source"],
        header=case.get("header", ""),
        template=case.get("template", ()),
        atomic_outputs=case.get("atomic_outputs", False),
    ).text


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_that_of_mlx(name: str, tmp_path: Path) -> None:
    case = SIGNATURES[name]
    assert ours("probe", case).strip() == printed_by_mlx("probe", case, tmp_path).strip()


# ---- our kernels, as the ops launch them ---------------------------------------------------------
CASES = {
    "single rows": cases.Case((1, 1, 1), (1, 37, 200), query_heads=8, dtype="float16"),
    "many rows": cases.Case((1, 9), (9, 30), key_dim=32, value_dim=32, window=20, sinks=True),
}


@pytest.mark.parametrize("name", CASES)
def test_signatures_of_our_kernels_are_those_of_mlx(name: str, tmp_path: Path) -> None:
    with recorded() as launches:
        cases.run(cases.make(CASES[name]))
    assert len(launches) > 1
    for made in launches:
        kernel = made.kernel
        described = {
            "inputs": {key: made.inputs[key] for key in kernel.input_names},
            "outputs": dict(
                zip(kernel.output_names, [dtype for _, dtype in made.outputs], strict=True)
            ),
            "source": kernel.source,
            "header": kernel.header,
        }
        text = signature(**made.described).text
        assert text.strip() == printed_by_mlx(kernel.name, described, tmp_path).strip()


@pytest.mark.parametrize("name", CASES)
def test_checked_and_unchecked_runs_agree_in_every_order(name: str) -> None:
    """Bit for bit: nothing depends on which thread comes first."""
    with recorded() as launches:
        made = cases.make(CASES[name])
        out, _ = cases.run(made)
    assert cases.error(out, cases.exact(made)) < cases.TOLERANCE[made.case.dtype]
    for done in launches:
        if done.kernel.mutable_inputs:
            continue
        kernel = done.kernel
        for check, order in ((False, 0), (True, 1), (False, 1), (False, 5)):
            again = metal_kernel(
                kernel.name,
                kernel.input_names,
                kernel.output_names,
                kernel.source,
                kernel.header,
                check=check,
                options=Options(order=order),
            )(
                inputs=[done.inputs[key] for key in kernel.input_names],
                grid=done.grid,
                threadgroup=done.threadgroup,
                output_shapes=[shape for shape, _ in done.outputs],
                output_dtypes=[dtype for _, dtype in done.outputs],
            )
            for one, other in zip(again, done.results, strict=True):
                assert mx.array_equal(one, other, equal_nan=True)


# ---- the interface -------------------------------------------------------------------------------
def run(source: str, *, check: bool = True, threads: int = 32, **inputs: mx.array) -> mx.array:
    inputs = inputs or {"a": mx.arange(64).astype(mx.float32)}
    made = metal_kernel("probe", list(inputs), ["o"], source, check=check)
    return made(
        inputs=list(inputs.values()),
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(threads,)],
        output_dtypes=[mx.float32],
    )[0]


@pytest.mark.parametrize("check", [True, False], ids=["checked", "plain"])
def test_inputs_written_in_place(check: bool) -> None:
    pool = mx.zeros((4, 8), mx.bfloat16)
    same = pool.reshape(-1)
    mx.eval(pool, same)
    made = metal_kernel(
        "write",
        ["pool"],
        ["token"],
        "uint i = thread_position_in_grid.x;\n"
        "const_cast<device bfloat16_t*>(pool)[i] = bfloat16_t(i);\n"
        "if (i == 0) { token[0] = 1; }",
        mutable_inputs=["pool"],
        check=check,
    )
    (token,) = made(
        inputs=[pool],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(1,)],
        output_dtypes=[mx.int32],
    )
    assert token.item() == 1
    assert pool.reshape(-1).tolist() == list(range(32))
    assert same.tolist() == list(range(32))


@pytest.mark.parametrize(
    "dtype", [mx.float32, mx.bfloat16, mx.float16, mx.int8, mx.uint64, mx.bool_], ids=str
)
def test_inputs_of_every_layout(dtype: mx.Dtype) -> None:
    """A transposed one and a slice arrive contiguous in rows, as MLX passes them."""
    whole = mx.arange(64).reshape(8, 8).astype(dtype)
    for array in (whole.T, whole[1:, ::2]):
        got = run(
            "uint i = thread_position_in_grid.x; o[i] = i < 28 ? float(a[i]) : 0.0f;", a=array
        )
        assert got.tolist()[:28] == array.astype(mx.float32).reshape(-1).tolist()[:28]


def test_scalars_empty_inputs_and_unwritten_outputs() -> None:
    made = metal_kernel("probe", ["a", "b", "c"], ["o", "p", "q"], "o[0] = a + b;")
    o, p, q = made(
        inputs=[2, 1.5, mx.zeros((0, 4))],
        grid=(1, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(2,), (1,), (1,)],
        output_dtypes=[mx.float32, mx.int32, mx.bool_],
    )
    assert o[0].item() == 3.5
    assert mx.isnan(o[1]).item() and p.item() == -1 and q.item() is True


def test_write_to_other_inputs_is_an_error() -> None:
    with pytest.raises(KernelError, match=r"write to buffer 'a', an input, at byte 0 .*probe"):
        run("const_cast<device float*>(a)[thread_position_in_grid.x] = 0.0f; o[0] = 0.0f;")


def test_text_that_does_not_compile() -> None:
    with pytest.raises(CompileError, match=r"probe.metal:2:.*no_such_name"):
        run("float x = 1.0f;\no[0] = x + no_such_name;")


def test_too_many_threads() -> None:
    with pytest.raises(ValueError, match="2048 threads"):
        run("o[0] = 1.0f;", threads=2048)


def test_too_many_buffers() -> None:
    arrays = {f"a{n}": mx.zeros((8,)) for n in range(16)}
    names = " + ".join(f"{name}_shape[0]" for name in list(arrays)[:15])
    with pytest.raises(ValueError, match="32 buffers; Metal has 31 at most"):
        run(f"o[0] = float({names});", **arrays)


def test_one_clear_error_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxrewrite.kernels.dialects.cpu import toolchain

    monkeypatch.delenv(toolchain.OVERRIDE, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(toolchain.NoCompilerError, match="pip install ziglang"):
        toolchain.compiler.__wrapped__()


@pytest.mark.slow
def test_processes_share_the_cache(tmp_path: Path) -> None:
    """Three at once, from an empty folder: all succeed and leave whole files only."""
    text = (
        "import mlx.core as mx\n"
        "from mlxrewrite.kernels.dialects.cpu import metal_kernel\n"
        "made = metal_kernel('probe', ['a'], ['o'], 'o[thread_position_in_grid.x] = a[0] + 41;')\n"
        "(o,) = made(inputs=[mx.ones((8,))], grid=(32, 1, 1), threadgroup=(32, 1, 1),\n"
        "    output_shapes=[(32,)], output_dtypes=[mx.float32])\n"
        "print(o[31].item())\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", text],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in running:
        out, error = process.communicate(timeout=300)
        assert out.strip() == "42.0", error
    made = sorted(path.name for path in (tmp_path / "mlxrewrite" / "kernels").iterdir())
    assert [name.split("_")[0] + Path(name).suffix for name in made] == [
        "kernel.cpp",
        "kernel.so",
        "runtime.so",
    ]


def test_ziglang_is_used_where_there_is_no_clang(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxrewrite.kernels.dialects.cpu import toolchain

    if find_spec("ziglang") is None:
        pytest.skip("needs the `runner` extra")
    monkeypatch.delenv(toolchain.OVERRIDE, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    chosen = toolchain.compiler.__wrapped__()
    assert chosen.zig and chosen.command[:3] == (sys.executable, "-m", "ziglang")


def test_the_newest_clang_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mlxrewrite.kernels.dialects.cpu import toolchain

    monkeypatch.delenv(toolchain.OVERRIDE, raising=False)
    for name in ("clang++", "clang++-14", "clang++-9", "clang++-19", "g++", "clang++-19.old"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.compiler.__wrapped__().command == (str(tmp_path / "clang++-19"),)
    (tmp_path / "clang++-19").chmod(0o644)
    assert toolchain.compiler.__wrapped__().command == (str(tmp_path / "clang++-14"),)


def test_a_cache_folder_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mlxrewrite.kernels.dialects.cpu import toolchain

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = toolchain.cache_folder.__wrapped__()
    assert folder.is_dir() and not folder.is_relative_to(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert toolchain.cache_folder.__wrapped__() == tmp_path / "mlxrewrite" / "kernels"

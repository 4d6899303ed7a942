"""Rules of Metal's language: which of the three readers of the static check, or the runner, sees a
violation. None of them is Metal's compiler; together they see all of these."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import mlx.core as mx
import pytest
from mlxrewrite.kernels.dialects.cpu import KernelError, metal_kernel
from mlxrewrite.kernels.dialects.cpu.source import Input
from mlxrewrite.kernels.dialects.cpu.static import Finding, check, lint
from mlxrewrite.kernels.inspect import array_dtype, list_specs, parse
from mlxrewrite.kernels.render import render
from mlxrewrite.kernels.specs import KernelSpec
from mlxrewrite.kernels.state_specs import state_step_spec

I = "uint i = thread_position_in_grid.x; "  # noqa: E741
SPACES, OPENCL, LINT, RUNNER = "address spaces", "OpenCL", "lint", "runner"


@dataclass(frozen=True)
class Rule:
    """A body that breaks one rule, and at least who sees it (nobody: it is legal)."""

    body: str
    seen_by: frozenset[str] = frozenset()
    header: str = ""
    dtype: mx.Dtype = mx.float32
    threads: int = 32
    sizes: dict[str, int] = field(default_factory=lambda: {"q": 4096, "n": 4})


def by(*who: str) -> frozenset[str]:
    return frozenset(who)


RULES = {
    # Legal.
    "plain": Rule(I + "o[i] = q[i] * T(2);"),
    "vector constructor and swizzles": Rule(
        I + "float4 v = float4(1.0f, 2.0f, 3.0f, 4.0f); v.xy = v.zw; o[i] = T(v.x);"
    ),
    "vector through a cast": Rule(
        I + "vec<T, 4> v = *reinterpret_cast<const device vec<T, 4>*>(q + 4 * i); o[i] = T(v[0]);"
    ),
    "pointer to a pointer": Rule(
        I + "const device T* p[2] = {q, q + 1}; o[i] = f(p, i);",
        header="template <typename U> U f(const device U* const thread* p, uint i)"
        " { return p[1][i]; }\n",
    ),
    "recursion over a template parameter": Rule(
        I + "o[i] = T(f<3>(i));",
        header="template <int N> METAL_FUNC int f(uint i) { return int(i) + f<N - 1>(i); }\n"
        "template <> METAL_FUNC int f<0>(uint i) { return 0; }\n",
    ),
    # Address spaces.
    "pointer without address space": Rule(I + "const T* p = q; o[i] = p[i];", by(SPACES)),
    "device pointer as threadgroup pointer": Rule(
        I + "threadgroup T* p = (o + i); p[0] = T(0);", by(SPACES, OPENCL)
    ),
    "device pointer to a small input": Rule(
        I + "const device int* p = n; o[i] = T(p[0]);", by(SPACES, OPENCL)
    ),
    "thread reference to device memory": Rule(
        I + "f(o[i]);",
        by(OPENCL),
        header="template <typename U> void f(thread U& x) { x = U(1); }\n",
    ),
    "pointer parameter without address space": Rule(
        I + "o[i] = g(q, i);",
        by(LINT),
        header="template <typename U> U g(const U* p, uint i) { return p[i]; }\n",
    ),
    "reference parameter without address space": Rule(
        I + "float x = 1.0f; g(x); o[i] = T(x);",
        by(LINT),
        header="void g(float& x) { x = 2.0f; }\n",
    ),
    "threadgroup array as device pointer": Rule(
        I + "threadgroup T s[32]; s[i] = q[i]; o[i] = g(s, i);",
        by(SPACES, OPENCL),
        header="template <typename U> U g(const device U* p, uint i) { return p[i]; }\n",
    ),
    "threadgroup matrix from thread memory": Rule(
        I + "float x[64]; x[0] = 1.0f; simdgroup_float8x8 m; simdgroup_load(m, x); o[i] = T(0);",
        by(SPACES, OPENCL),
    ),
    "write through a const pointer": Rule(
        I + "q[i] = T(0); o[i] = T(0);", by(SPACES, OPENCL, RUNNER)
    ),
    # Types and literals.
    "double": Rule(I + "double x = 1.0; o[i] = T(x);", by(SPACES, OPENCL, RUNNER)),
    "literal without f": Rule(I + "o[i] = T(q[i] * 0.5);", by(LINT)),
    "literal with an exponent without f": Rule(I + "o[i] = T(q[i] * 1e-3);", by(LINT)),
    "float to bfloat without a cast": Rule(
        I + "T x = float(q[i]) * 2.0f; o[i] = x;", by(RUNNER), dtype=mx.bfloat16
    ),
    "half to bfloat without a cast": Rule(
        I + "half h = 1.0h; T x = h; o[i] = x;", by(RUNNER), dtype=mx.bfloat16
    ),
    "too few elements": Rule(I + "float3 v = float3(1.0f, 2.0f); o[i] = T(v.x);", by(RUNNER)),
    "max of int and uint": Rule(I + "o[i] = T(max(n[0], i));", by(SPACES, OPENCL, RUNNER)),
    "64 bits across lanes": Rule(I + "o[i] = T(simd_sum(long(i)));", by(SPACES, OPENCL, RUNNER)),
    "long long": Rule(I + "long long x = 1; o[i] = T(x);", by(LINT)),
    "variable-length array": Rule(
        I + "float x[n[0] + 2]; x[0] = 1.0f; o[i] = T(x[0]);", by(SPACES, OPENCL, RUNNER)
    ),
    # Statements.
    "recursion": Rule(
        I + "o[i] = T(f(5));",
        by(LINT),
        header="int f(int x) { return x < 2 ? 1 : x * f(x - 1); }\n",
    ),
    "lambda": Rule(I + "auto f = [&](int x) { return x + 1; }; o[i] = T(f(2));", by(LINT)),
    "goto": Rule(I + "if (i > 3) goto e; o[i] = T(1); e: o[i] = T(2);", by(LINT)),
    "new": Rule(I + "int* p = new int[2]; p[i] = 1; o[i] = T(p[0]);", by(LINT, RUNNER)),
    "std::": Rule(I + "o[i] = T(std::max(1, 2));", by(SPACES, OPENCL, LINT, RUNNER)),
    "a word of CUDA": Rule(I + "__syncthreads(); o[i] = T(1);", by(SPACES, OPENCL, LINT, RUNNER)),
    "printf": Rule(I + 'printf("x"); o[i] = T(1);', by(LINT)),
    "static variable": Rule(I + "static int c = 0; c++; o[i] = T(c);", by(LINT)),
    "global variable not in constant": Rule(
        I + "o[i] = T(K);", by(LINT), header="const float K = 2.0f;\n"
    ),
    "no return": Rule(
        I + "o[i] = T(f(i));",
        by(SPACES, OPENCL, RUNNER),
        header="float f(uint i) { if (i > 99) { return 1.0f; } }\n",
    ),
    "uninitialised variable": Rule(I + "int z; if (i > 100) { z = 1; } o[i] = T(z);", by(RUNNER)),
    # Threadgroup memory and limits.
    "threadgroup variable in an inner scope": Rule(
        I + "if (i < 64) { threadgroup float s[32]; s[i % 32] = 1.0f; } o[i] = T(1);",
        by(OPENCL, LINT),
    ),
    "threadgroup variable in a helper": Rule(
        I + "o[i] = T(f(i));",
        by(LINT),
        header="float f(uint i) { threadgroup float s[32]; s[i] = 1.0f; return s[i]; }\n",
    ),
    "more than 32 KB of threadgroup memory": Rule(
        I + "threadgroup float s[9000]; s[i] = 1.0f; o[i] = T(s[i]);", by(RUNNER)
    ),
    "more than 1024 threads": Rule(I + "o[i] = T(1);", by(RUNNER), threads=2048),
}


def findings(rule: Rule) -> list[Finding]:
    return check(
        name="probe",
        inputs=[
            Input("q", rule.dtype, rule.sizes["q"], 1),
            Input("n", mx.int32, rule.sizes["n"], 1),
        ],
        output_names=["o"],
        output_dtypes=[rule.dtype],
        source=rule.body,
        header=rule.header,
        template=[("T", rule.dtype)],
    )


def refused_by_runner(rule: Rule) -> bool:
    made = metal_kernel("probe", ["q", "n"], ["o"], rule.body, rule.header)
    try:
        made(
            inputs=[
                mx.zeros((rule.sizes["q"],), rule.dtype),
                mx.zeros((rule.sizes["n"],), mx.int32),
            ],
            template=[("T", rule.dtype)],
            grid=(rule.threads, 1, 1),
            threadgroup=(rule.threads, 1, 1),
            output_shapes=[(4096,)],
            output_dtypes=[rule.dtype],
        )
    except (KernelError, ValueError):
        return True
    return False


@pytest.mark.parametrize("name", RULES)
def test_rule(name: str) -> None:
    rule = RULES[name]
    found = findings(rule)
    seen: set[str] = {finding.reader for finding in found}
    if refused_by_runner(rule):
        seen.add(RUNNER)
    if not rule.seen_by:
        assert not seen, found
    assert rule.seen_by <= seen, found


def test_a_large_input_is_in_device_memory() -> None:
    rule = RULES["device pointer to a small input"]
    large = Rule(rule.body, sizes={"q": 4096, "n": 8})
    assert not findings(large)


def test_findings_name_file_and_line() -> None:
    (found,) = lint("// a\nint f(int* p) { return p[0]; }\n", "o[0] = 1.0f;")
    assert (found.file, found.line) == ("kernel.header", 2)
    (found,) = lint("", "o[0] = 1.0f;\n\no[0] = 0.5;\n")
    assert (found.file, found.line) == ("kernel.metal", 3)


# ---- every text that is rendered -----------------------------------------------------------------
FIXED_TYPES = dict.fromkeys(("decay", "beta", "state", "state_out"), mx.float32)


# What ops pass with few elements, always or for small models: `constant` in the text.
FEW = "token_in", "settings", "sinks", "decay", "beta"


def described(spec: KernelSpec) -> dict[str, object]:
    """Inputs and outputs of a spec, types by name."""
    kernel = render(spec)

    def dtype(array: str) -> mx.Dtype:
        return FIXED_TYPES.get(array) or array_dtype(spec, array)

    return {
        "name": kernel.name,
        "inputs": [
            Input(array, dtype(array), 4 if array in FEW else 4096, 1)
            for array in kernel.input_names
        ],
        "output_names": kernel.output_names,
        "output_dtypes": [dtype(array) for array in kernel.output_names],
        "source": kernel.source,
        "header": kernel.header,
    }


def kinds(names: list[str]) -> list[str]:
    """One name of each template and set of features."""
    found: dict[object, str] = {}
    for name in names:
        spec = parse(name)
        flags = [getattr(spec, part.name) for part in fields(spec) if part.type in (bool, "bool")]
        found.setdefault((spec.template, getattr(spec, "bits", 0), *flags), name)
    return list(found.values())


KINDS = kinds(list_specs())


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in list_specs()],
)
def test_rendered_text_is_clean(name: str) -> None:
    found = check(**described(parse(name)))  # type: ignore[arg-type]
    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_text_of_state_steps_is_clean(per_channel: bool, delta: bool) -> None:
    q, v = mx.zeros((1, 1, 2, 64), mx.float16), mx.zeros((1, 1, 4, 32), mx.float16)
    spec = state_step_spec(q, q, v, per_channel=per_channel, delta=delta)
    found = check(**described(spec))  # type: ignore[arg-type]
    assert not found, "\n".join(map(str, found))

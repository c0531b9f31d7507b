"""Every kernel that a plan can choose compiles for every architecture, without spilling a register.

No GPU is needed, only NVRTC: the code is compiled, not run.
"""

from __future__ import annotations

import dataclasses

import pytest

from cuflash._attention import plan as attention_plan
from cuflash._attention import plan_around
from cuflash._attention.problem import Problem
from cuflash.jit import compile, gpu
from cuflash.jit.launch import Plan

# Every pair of buckets: where d_v's is the larger, it serves both.
HEAD_DIMS = [(d, d_v) for d in attention_plan.BUCKETS for d_v in attention_plan.BUCKETS if d_v <= d]
EQUAL = [(d, d) for d in attention_plan.BUCKETS]
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)

# ptxas calls these out when it serialises wgmma or gives up on a register budget.
WARNINGS = (
    "C7510",
    "C7511",
    "C7512",
    "C7513",
    "C7514",
    "C7515",
    "serialized",
    "setmaxnreg ignored",
)


@pytest.fixture(scope="module", autouse=True)
def nvrtc() -> None:
    pytest.importorskip("cupy", reason="needs CuPy and NVRTC, but no GPU")


def problem(
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    precision: str | None = None,
    dropout: bool = False,
) -> Problem:
    """A problem of ordinary size."""
    lengths = {"batch": (2,), "heads": 4, "kv_heads": 2, "len_q": 512, "len_k": 512}
    window = {"left": None, "right": 0, "q_start": None}
    arrays = {"q_start_array": False, "kv_lengths_array": False}
    return Problem(
        dtype=dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        scale=0.125,
        precision=precision,
        return_lse=True,
        dropout=dropout,
        **lengths,
        **window,
        **arrays,
    )


# Inputs' dtype, dtype of out, precision, and the head dims.
KINDS = {
    "float16": ("float16", "float16", None, HEAD_DIMS),
    "bfloat16": ("bfloat16", "bfloat16", None, HEAD_DIMS),
    "float32": ("float32", "float32", None, HEAD_DIMS),
    "float64": ("float64", "float64", None, HEAD_DIMS),
    "float16 to float32": ("float16", "float32", None, EQUAL),
    "bfloat16 to float32": ("bfloat16", "float32", None, EQUAL),
    "tf32": ("float32", "float32", "tf32", EQUAL),
}
DROPPED = " with dropout"
KINDS |= {f"{kind}{DROPPED}": (*KINDS[kind][:3], EQUAL) for kind in list(KINDS)}


def attention_plans(arch: int, kind: str) -> list[Plan]:
    """The plans of all pairs of head dims, one of each kernel, and of merging their results."""
    dtype, output, precision, head_dims = KINDS[kind]
    dropout = kind.endswith(DROPPED)
    plans: list[Plan] = []
    if precision is None and not dropout:
        plans.append(plan_around.merge(dtype, output, (2, 4, 512, 64)))
    for d, d_v in head_dims:
        asked, model = problem(dtype, d, d_v, precision, dropout), gpu.of_arch(arch)
        plans.append(attention_plan.choose(asked, model, output))
        if arch == 90:
            plans.append(attention_plan.choose(asked, model, output, stored_by_tma=False))
    return list({str(chosen.kernel): chosen for chosen in plans}.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attention_compiles_without_spills(arch: int, kind: str) -> None:
    for chosen in attention_plans(arch, kind):
        check(chosen, arch)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_packed_sequences_compile_without_spills(arch: int, dtype: str) -> None:
    model = gpu.of_arch(arch)
    for d in (64, 128, 256):
        asked = dataclasses.replace(problem(dtype, d, d), batch=(1, 1, 1, 5), varlen=True)
        chosen = attention_plan.choose(asked, model, dtype, packs=False)
        # The assembler of CUDA 13.0 spills there, that of 13.5 does not.
        old = (arch, d) == (100, 128) and dtype in ("float16", "bfloat16") and nvrtc_is("13.0")
        check(chosen, arch, spills=32 if old else 0)
    check(plan_around.sequences(asked, chosen), arch)


def nvrtc_is(version: str) -> bool:
    from cupy.cuda import nvrtc

    return ".".join(map(str, nvrtc.getVersion())) == version


def check(chosen: Plan, arch: int, spills: int = 0) -> None:
    """The cubin keeps what the plan promises."""
    found = compile.cubin(chosen.kernel, arch)
    model = gpu.of_arch(arch)
    about = f"{chosen.kernel} for sm_{arch}"
    assert found.spills <= spills, f"{about} spills {found.spills} bytes"
    assert found.registers * chosen.threads <= 65536, f"{about} uses {found.registers} registers"
    if chosen.kernel.exact:  # or setmaxnreg waits for registers that nobody gives back
        assert found.registers == 65536 // chosen.threads // 8 * 8, f"{about}: {found.registers}"
    total = chosen.shared_memory + found.static_shared_memory
    assert total <= model.shared_memory_per_block, f"{about} needs {total} bytes of shared memory"
    assert not [warning for warning in WARNINGS if warning in found.log], f"{about}:\n{found.log}"


@pytest.mark.parametrize(("d", "d_v"), [(64, 96), (300, 500)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_host_knows_the_kernels_shared_memory_and_params(dtype: str, d: int, d_v: int) -> None:
    """static_asserts appended to the kernel: the compiler itself compares."""
    from cuflash._attention import gpu as host

    arch = 80
    chosen = attention_plan.choose(problem(dtype, d, d_v), gpu.of_arch(arch), dtype)
    products = {"float32": "Tf32Products", "float64": "DoubleProducts"}.get(dtype, "HalfProducts")
    size = host.params_dtype("float64" if dtype == "float64" else "float32").itemsize
    checks = (
        f"static_assert(Shared<{products}>::kBytes == {chosen.shared_memory});"
        f"static_assert(sizeof(Params) == {size});"
    )
    compile.cubin(chosen.kernel, arch, also=checks)


@pytest.mark.parametrize(
    ("d", "d_v", "stored"), [(64, 96, True), (64, 64, False), (256, 256, True)]
)
def test_the_host_knows_the_hopper_kernels_shared_memory_and_params(
    d: int, d_v: int, stored: bool
) -> None:
    from cuflash._attention import gpu as host

    asked = problem("float16", d, d_v)
    chosen = attention_plan.choose(asked, gpu.of_arch(90), "float16", stored_by_tma=stored)
    checks = (
        f"static_assert(SharedMemory::kBytes == {chosen.shared_memory});"
        f"static_assert(sizeof(HopperParams) == {host.hopper_dtype().itemsize});"
    )
    compile.cubin(chosen.kernel, 90, also=checks)

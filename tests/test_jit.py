"""From sources to launches: includes, errors, caches, architectures, threads and graphs."""

from __future__ import annotations

import contextlib
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import calling
import numpy as np
import pytest
import tolerance
from strategies import Call

import cuflash
from cuflash import tools
from cuflash.jit import compile, gpu, launch, source
from cuflash.jit.source import Kernel

COMBINE = Kernel(
    "_attention/combine.cu",
    "attention_combine",
    (("Element", "float16"), ("Output", "float32"), ("kParts", 3), ("kSome", True)),
)


def ordinary_call(dtype: str, seed: int = 0, **options: object) -> Call:
    """Causal, grouped heads, lengths that fill no tile."""
    rng = np.random.default_rng(seed)
    named = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    shapes = (2, 4, 70, 48), (2, 2, 133, 48), (2, 2, 133, 40)
    q, k, v = (rng.standard_normal(shape, np.float32).astype(named) for shape in shapes)
    return Call(q, k, v, {"causal": True, **options})


# Sources


def test_includes_are_expanded_once() -> None:
    text = source.text(COMBINE)
    assert "#include" not in text
    for header in ("device/types.cuh", "device/online_softmax.cuh"):
        assert text.count(f'#line 1 "cuflash/{header}"') == 1


def test_constants_are_declarations_in_front_of_the_kernel() -> None:
    text = source.text(COMBINE)
    declared = (
        "using Element = float16;\nusing Output = float32;\n"
        "constexpr int kParts = 3;\nconstexpr bool kSome = true;\n"
    )
    assert declared in text
    assert text.index(declared) < text.index('#line 1 "cuflash/_attention/combine.cu"')


def test_every_line_says_where_it_stands() -> None:
    """After each #line, the text goes on as the named file does from that line."""
    kernel = Kernel("_attention/forward_mma.cu", "attention_forward")
    parts = re.split(r'#line (\d+) "cuflash/([^"]+)"\n', source.text(kernel))[1:]
    for number, path, text in zip(parts[::3], parts[1::3], parts[2::3]):
        expected = source._read(path).splitlines()[int(number) - 1 :]
        written = text.rstrip("\n").splitlines()
        same = [a for a, b in zip(written, expected) if a != b and not b.startswith("#include")]
        assert not same, f"{path}:{number}"


def test_a_compile_error_names_file_and_line() -> None:
    pytest.importorskip("cupy")
    broken = replace(COMBINE, constants=(("Element", "float16"), ("Output", "float32")))
    with pytest.raises(RuntimeError, match=r"cuflash/_attention/combine\.cu\(\d+\): error.*kParts"):
        compile.cubin(broken, 90)


def test_without_nvrtc_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    nvrtc = pytest.importorskip("cupy").cuda.nvrtc

    def absent() -> None:
        raise RuntimeError("libnvrtc.so.13: cannot open shared object file")

    monkeypatch.setattr(nvrtc, "getVersion", absent)
    monkeypatch.setattr(compile, "_nvrtc_is_open", False)
    with pytest.raises(RuntimeError, match=r"pip install 'cuflash\[cuda13\]'"):
        compile.cubin(COMBINE, 90)


# Architectures


def test_unknown_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="arch is 42; known architectures are 75, 80"):
        gpu.of_arch(42)
    for forced in ("sm_80", "81", "120"):
        with pytest.raises(ValueError, match=rf"CUFLASH_ARCH is {forced!r}; this .* runs 75, 80"):
            gpu._as_older(gpu.of_arch(90), forced)
    assert gpu._as_older(gpu.of_arch(90), "80").forced
    assert not gpu._as_older(gpu.of_arch(90), "90").forced


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("arch", [75, 80, 86, 90])
def test_code_of_an_older_architecture_runs_here(
    arch: int, dtype: str, cp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUFLASH_ARCH", str(arch))
    if arch > gpu._of_device(0, None).arch:
        pytest.skip(f"this GPU is older than sm_{arch}")
    call = ordinary_call(dtype)
    calling.judge(call).check(*calling.attend(call, cp))
    (q, k, v), options = call.on(cp)
    for plan in planned(cuflash.attention, q, k, v, **options):
        assert plan.load().ptx_version == arch
    answer = cuflash.softmax(q, axis=-1)
    for plan in planned(cuflash.softmax, q, axis=-1):
        assert plan.load().ptx_version == arch
    expected = cuflash.softmax(call.q, axis=-1).astype(np.float64)
    unit = tolerance.ROUNDOFF[dtype]
    assert np.abs(answer.get().astype(np.float64) - expected).max() <= 4 * unit


def planned(function, *args: object, **kwargs: object) -> list:
    return tools._planner(function)(*args, **kwargs)[1]


# Explaining and warming up


def test_explain_tells_what_the_loaded_kernel_says(cp) -> None:
    (q, k, v), options = ordinary_call("float16").on(cp)
    text = cuflash.explain(cuflash.attention, q, k, v, **options)
    (plan,) = planned(cuflash.attention, q, k, v, **options)
    loaded = plan.load()
    assert f"{loaded.num_regs} a thread, {loaded.local_size_bytes} B spilled" in text
    assert f"{plan.grid[0]} x 1 x 1 blocks of {plan.threads} threads" in text
    assert plan.kernel.file in text
    assert "used in place" in text


def test_explain_names_what_is_copied(cp) -> None:
    (q, k, v), options = ordinary_call("float16").on(cp)
    text = cuflash.explain(cuflash.attention, q[..., 1:], k[..., 1:], v, **options)
    assert re.search(r"copies +q, k\n|copies +q, k$", text)


def test_explain_and_warmup_refuse_what_launches_nothing() -> None:
    for tool in (cuflash.explain, cuflash.warmup):
        with pytest.raises(TypeError, match=r"`f` is .*allowed are cuflash\.attention"):
            tool(np.matmul, 1, 2)


def test_warmup_compiles_all_that_the_call_needs(cp) -> None:
    (q, k, v), options = ordinary_call("float32", window=7).on(cp)
    assert cuflash.warmup(cuflash.attention, q, k, v, **options) == 1
    before = dict(compile._kernels)
    cuflash.attention(q, k, v, **options)
    assert compile._kernels == before


@pytest.mark.parametrize("bar", [True, False])
def test_kernels_load_with_and_without_a_progress_bar(bar, monkeypatch) -> None:
    """tqdm is in the extras: whoever brings a CuPy of their own may not have it."""
    if bar:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    cupy = pytest.importorskip("cupy")
    monkeypatch.setattr(cupy.cuda, "Device", lambda ordinal: contextlib.nullcontext())
    loaded = []

    class Planned:
        def load(self) -> None:
            loaded.append(self)

    plans = [Planned(), Planned(), Planned()]
    tools._load(0, plans, "attention")
    assert set(loaded) == set(plans)


def test_show_config_speaks_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    cuflash.show_config()
    assert capsys.readouterr().out.startswith("cuflash ")


# Launching


@pytest.mark.parametrize(
    ("kernels", "together"), [("a", ""), ("aX", ""), ("ab", "ab"), ("aXbY", "ab"), ("XY", "")]
)
def test_what_is_new_of_a_call_is_compiled_together(kernels, together, monkeypatch) -> None:
    """A single kernel, or what is known already (in capitals), is loaded when it is launched."""
    cupy = pytest.importorskip("cupy")
    jobs: list[str] = []
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    monkeypatch.setattr(compile, "known", str.isupper)
    monkeypatch.setattr(launch, "side_by_side", lambda _, new: [job() for job in new])
    monkeypatch.setattr(launch, "_load", lambda plan: jobs.append(plan.kernel))
    launch.load([SimpleNamespace(kernel=kernel) for kernel in kernels])
    assert "".join(jobs) == together


def test_threads_share_one_compilation_and_get_their_own_answers(cp) -> None:
    compile._kernels.clear()
    calls = [ordinary_call(dtype, seed) for seed in range(4) for dtype in ("float16", "float32")]
    expected = [calling.judge(call) for call in calls]
    streams = [cp.cuda.Stream(non_blocking=True) for _ in calls]

    def work(call: Call, stream) -> list[tuple[np.ndarray, np.ndarray]]:
        cp.cuda.Device(0).use()
        (q, k, v), options = call.on(cp)
        cp.cuda.Device().synchronize()
        with stream:
            results = [cuflash.attention(q, k, v, **options, return_lse=True) for _ in range(20)]
        stream.synchronize()
        return [(out.get(), lse.get()) for out, lse in results]

    with ThreadPoolExecutor(len(calls)) as pool:
        answers = list(pool.map(work, calls, streams))
    for judge, found in zip(expected, answers):
        for out, lse in found:
            judge.check(out, lse)
    files = [key[0].file for key in compile._kernels if "_attention/forward" in key[0].file]
    assert len(files) == 2


@pytest.mark.parametrize("again", [False, True])
def test_a_new_thread_has_all_that_a_call_needs(again: bool, cp) -> None:
    """Whether its first call of CUDA is a new call of attention or one that was made before."""
    call = ordinary_call("float16", 3 + again)
    (q, k, v), options = call.on(cp)
    if not again:  # nothing is allocated, which might be the first call of CUDA
        options["out"] = cp.empty((2, 4, 70, 40), q.dtype), cp.empty((2, 4, 70), "float32")

    def work() -> cuflash.AttentionResult:
        return cuflash.attention(q, k, v, **options, return_lse=True)

    if again:
        work()
    with ThreadPoolExecutor(1) as pool:
        out, lse = pool.submit(work).result()
    calling.judge(call).check(out.get(), lse.get())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_captured_call_replays_on_new_data(dtype: str, cp) -> None:
    """Capture fails on a synchronisation, so this also shows that there is none."""
    first, second = ordinary_call(dtype, 1), ordinary_call(dtype, 2)
    (q, k, v), options = first.on(cp)
    out = cp.empty((2, 4, 70, 40), q.dtype)
    cuflash.warmup(cuflash.attention, q, k, v, **options, out=out)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        cuflash.attention(q, k, v, **options, out=out)
        graph = stream.end_capture()
        graph.launch()
    stream.synchronize()
    calling.judge(first).check(out.get())
    for array, values in zip((q, k, v), (second.q, second.k, second.v)):
        array.set(values)
    cp.cuda.Device().synchronize()  # a stream that does not block does not wait for the copies
    with stream:
        graph.launch()
    stream.synchronize()
    calling.judge(second).check(out.get())


def test_what_must_be_copied_is_refused_in_a_capture(cp) -> None:
    """The copy's memory would be somebody else's at the replay."""
    x = cp.zeros((2, 9, 33), cp.float16)
    out = cp.empty_like(x)
    cuflash.warmup(cuflash.attention, x, x, x, out=out)
    stream = cp.cuda.Stream(non_blocking=True)
    cp.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="q and k and v must be copied first"):
                cuflash.attention(x, x, x, out=out)
        finally:
            stream.end_capture()


def test_merging_can_be_explained_and_warmed_up(cp) -> None:
    outs, lses = [cp.zeros((2, 5, 16), cp.float16)] * 3, [cp.zeros((2, 5), cp.float32)] * 3
    assert cuflash.warmup(cuflash.merge_attention, outs, lses) == 1
    assert cuflash.warmup(cuflash.merge_attention, outs * 50, lses * 50) == 3
    assert "combine.cu" in cuflash.explain(cuflash.merge_attention, outs, lses)

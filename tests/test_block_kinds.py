"""BlockMask.of: a mask looked at once. Its kinds are counted one block at a time, by formulas of
Python; a call with it is the call with the mask itself, or an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from calling import attend, host, judge
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Problem, materialise
from test_compile import ARCHITECTURES, check, problem

import cuflash
from cuflash import BlockMask, Variant
from cuflash._attention import block_kinds, plan, plan_around
from cuflash._attention.api import prepare
from cuflash.jit import compile, gpu, repeat

few = settings(max_examples=max(8, settings().max_examples // 4))
BATCH, HEADS = 3, 2


@dataclasses.dataclass(frozen=True)
class Mask:
    """A Variant's mask, its values of a random generator, and what it means in NumPy."""

    source: str
    rule: Callable[..., Any]
    values: Callable[[np.random.Generator, int, int], dict[str, Any]] = lambda *_: {}
    axes: str = ""  # of "b" and "h", those it depends on


def documents(random: np.random.Generator, len_q: int, len_k: int) -> dict[str, Any]:
    return {"doc": np.sort(random.integers(0, 4, (BATCH, max(len_q, len_k))), axis=-1)}


MASKS = {
    "causal": Mask("j <= i", lambda i, j, **_: j <= i),
    "band": Mask("-30 < row - j < 50", lambda row, j, **_: (row - j > -30) & (row - j < 50)),
    "documents": Mask(
        "doc[b, row] == doc[b, j]",
        lambda b, row, j, doc, **_: doc[b, row] == doc[b, j],
        documents,
        "b",
    ),
    "a reach for each head": Mask(
        "abs(i - j) < reach[h] or j < 5",
        lambda h, i, j, reach, **_: (abs(i - j) < reach[h]) | (j < 5),
        lambda random, *_: {"reach": random.integers(0, 120, HEADS)},
        "h",
    ),
    "both": Mask(
        "(j * 2 + b) // 90 == (row + h) // 45  # by halves",
        lambda b, h, row, j, **_: (j * 2 + b) // 90 == (row + h) // 45,
        axes="bh",
    ),
    "an array": Mask(
        "seen[row, j]",
        lambda row, j, seen, **_: seen[row, j],
        lambda random, q, k: {"seen": random.random((q, k)) < random.choice([0.001, 0.5, 0.999])},
    ),
    "the end": Mask("j >= len_k - 40", lambda j, len_k, **_: j >= len_k - 40),
    "numbers": Mask(
        "x[j] * 0.5 < cap",
        lambda j, x, cap, **_: x[j] * 0.5 < cap,
        lambda random, q, k: {"x": np.linspace(0, 1, k), "cap": 0.3},
    ),
    "all": Mask("True", lambda **_: True),
    "nothing": Mask("False", lambda **_: False),
}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A mask with its values, the call that it is for, and blocks."""

    name: str
    seed: int
    len_q: int
    len_k: int
    q_start: int | None
    size: int | tuple[int, int]

    def values(self) -> dict[str, Any]:
        return MASKS[self.name].values(np.random.default_rng(self.seed), self.len_q, self.len_k)

    def variant(self, xp: Any) -> Variant:
        given = {n: xp.asarray(x) if np.ndim(x) else x for n, x in self.values().items()}
        made = Variant(mask=MASKS[self.name].source)
        return made(**given) if given else made

    def blocks(self, xp: Any, variant: Variant | None = None, **more: Any) -> BlockMask:
        options = {"heads": HEADS, "batch": BATCH, "size": self.size, "q_start": self.q_start}
        options["like"] = xp.ones(1, "float32")
        made = self.variant(xp) if variant is None else variant
        return BlockMask.of(made, self.len_q, self.len_k, **{**options, **more})

    def seen(self) -> np.ndarray:
        """Every place, [BATCH, HEADS, len_q, len_k]."""
        start = self.len_k - self.len_q if self.q_start is None else self.q_start
        b, h, row, j = np.ogrid[:BATCH, :HEADS, : self.len_q, : self.len_k]
        at = {"b": b, "h": h, "row": row, "i": row + start, "j": j, "len_k": self.len_k}
        return np.broadcast_to(
            MASKS[self.name].rule(**at, **self.values()), (b + h + row + j).shape
        )


def drawn(*names: str) -> st.SearchStrategy[Drawn]:
    sizes = st.sampled_from([16, 64, 128, (128, 64), (48, 80), (1, 300), (200, 7)])
    lengths = st.integers(1, 300) | st.sampled_from([1, 127, 128, 129, 256])
    starts = st.none() | st.integers(-50, 200)
    return st.builds(
        Drawn,
        st.sampled_from(names or [*MASKS]),
        st.integers(0, 99),
        lengths,
        lengths,
        starts,
        sizes,
    )


@few
@given(made=drawn())
def test_kinds_of_blocks(xp, made):
    kinds, seen, axes = host(made.blocks(xp).blocks), made.seen(), MASKS[made.name].axes
    size_q, size_k = made.size if isinstance(made.size, tuple) else (made.size,) * 2
    blocks = -(-made.len_q // size_q), -(-made.len_k // size_k)
    front = BATCH if "b" in axes else 1, HEADS if "h" in axes else 1
    assert kinds.dtype == np.int8
    assert kinds.shape == (*(n for n in front if n > 1), *blocks)
    kinds = np.broadcast_to(kinds.reshape(*front, *blocks), (BATCH, HEADS, *blocks))
    for place in np.ndindex(kinds.shape):
        b, h, n, m = place
        part = seen[b, h, n * size_q : (n + 1) * size_q, m * size_k : (m + 1) * size_k]
        assert part.size
        assert kinds[place] == (2 if part.all() else 1 if part.any() else 0), place


def call_of(made: Drawn, dtype: str = "float32") -> Any:
    sides = {"group": HEADS, "kv_heads": 1, "len_q": made.len_q, "len_k": made.len_k}
    asked = Problem(made.seed, dtype, (BATCH,), ((False,),) * 3, q_start=made.q_start, **sides)
    return materialise(asked)


@few
@given(made=drawn())
def test_a_call_is_the_one_with_the_mask_itself(xp, made):
    call = call_of(made)
    found = attend(call, xp, variant=made.blocks(xp))
    judge(call, mask=made.seen()).check(*found)
    for one, other in zip(found, attend(call, xp, variant=made.variant(xp))):
        if xp is np:
            np.testing.assert_array_equal(one, other)  # tiles are the same
        else:
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", ["documents", "a reach for each head", "an array"])
def test_every_dtype(xp, name, dtype):
    for size, lengths in ((128, (256, 300)), (384, (400, 390)), (100, (150, 230))):
        made = Drawn(name, 1, *lengths, None, size)
        call = call_of(made, dtype)
        judge(call, mask=made.seen()).check(*attend(call, xp, variant=made.blocks(xp)))


@few
@given(made=drawn("band", "documents", "an array"), other=st.integers(0, 9))
def test_scores_and_masks_of_several_parts(xp, made, other):
    slopes = np.array([0.5, 0.25])
    scored = Variant("score - kinds[h] * abs(row - j)", "(row + j) % kinds_ != 1")
    joined = made.variant(xp) & scored(kinds=xp.asarray(slopes), kinds_=3 + other)
    warm = Variant("score * 1.5")
    call = call_of(made)
    row, j = np.ogrid[: made.len_q, : made.len_k]
    truth = judge(
        call,
        mask=made.seen() & ((row + j) % (3 + other) != 1),
        score=lambda score, h, row, j, **_: (score - slopes[h] * abs(row - j)) * 1.5,
    )
    whole = made.blocks(xp, joined & warm)
    truth.check(*attend(call, xp, variant=whole))
    truth.check(*attend(call, xp, variant=made.blocks(xp, joined) & warm))
    truth.check(*attend(call, xp, variant=made.blocks(xp, whole, size=32)))  # blocks of blocks


def test_a_callers_own_blocks_have_kinds_too(xp):
    own = BlockMask(xp.asarray(np.eye(3, dtype=bool)), 20)
    kinds = host(BlockMask.of(own, 60, 60, size=(20, 10)).blocks)
    np.testing.assert_array_equal(kinds, np.kron(np.eye(3), [[2, 2]]))
    with pytest.raises(ValueError, match="must have shape"):
        BlockMask.of(own, 80, 60)


@pytest.mark.parametrize(("len_q", "len_k"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_look_at(xp, len_q, len_k):
    made = Drawn("causal", 0, len_q, len_k, None, 4)
    truth = judge(call_of(made))
    truth.check(*attend(call_of(made), xp, variant=made.blocks(xp)))


# Calls that blocks were not made for.


def inputs(xp, len_q=40, len_k=60, heads=HEADS, dtype="float32", batch=(BATCH,)):
    return [xp.ones((*batch, heads, n, 8), dtype) for n in (len_q, len_k, len_k)]


REFUSED = [
    ("all", {"len_q": 41}, {}, "for len_q 40, not 41"),
    ("all", {"len_k": 59}, {}, "for len_k 60, not 59"),
    ("causal", {}, {"q_start": 19}, "for q_start 20, not 19"),
    ("causal", {}, {"kv_lengths": 59}, "for q_start 20, not 19"),
    (
        "causal",
        {},
        {"kv_lengths": np.full(BATCH, 60)},
        "for q_start 20, not one that arrays decide",
    ),
    ("causal", {}, {"q_start": np.full(BATCH, 20)}, "for q_start 20, not one that arrays decide"),
    ("the end", {}, {"kv_lengths": 59}, "for kv_lengths 60, not 59"),
    ("the end", {}, {"kv_lengths": np.full(BATCH, 60)}, "for kv_lengths 60, not one that arrays"),
    ("a reach for each head", {"heads": 4}, {}, "for heads 2, not 4"),
    ("documents", {"batch": (2,)}, {}, "for batch 3, not 2"),
    ("documents", {"batch": (3, 2)}, {}, "for batch 3, not 6"),
    ("numbers", {"dtype": "float16"}, {}, "for dtype float32, not float16"),
]
TAKEN = [
    ("all", {"heads": 4, "batch": (2, 5)}, {"q_start": 3, "kv_lengths": np.array([[7], [60]])}),
    ("causal", {"heads": 1, "dtype": "float16"}, {"q_start": 20, "kv_lengths": np.full(BATCH, 9)}),
    ("band", {}, {"kv_lengths": 30}),
    ("documents", {"batch": (3, 1)}, {"q_start": np.array([[3], [4], [5]]), "causal": True}),
    ("numbers", {}, {"kv_lengths": 50}),
]


def on(xp: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {n: xp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}


@pytest.mark.parametrize(("name", "sizes", "options", "words"), REFUSED)
def test_calls_that_blocks_were_not_made_for(xp, name, sizes, options, words):
    made = Drawn(name, 0, 40, 60, None, 16)
    for _ in range(2):  # after a call that is known, too
        with pytest.raises(ValueError, match=r"`variant's kinds` were made " + words):
            cuflash.attention(*inputs(xp, **sizes), variant=made.blocks(xp), **on(xp, options))
        cuflash.attention(*inputs(xp), variant=made.blocks(xp))


@pytest.mark.parametrize(("name", "sizes", "options"), TAKEN)
def test_calls_that_change_nothing_for_the_blocks(xp, name, sizes, options):
    made = Drawn(name, 0, 40, 60, None, 16)
    arrays, options = inputs(xp, **sizes), on(xp, options)
    own = cuflash.attention(*arrays, variant=made.variant(xp), **options)
    found = cuflash.attention(*arrays, variant=made.blocks(xp), **options)
    np.testing.assert_allclose(host(found), host(own), rtol=1e-3)


BAD = [
    ({"variant": "j <= i"}, TypeError, "`variant` must be a cuflash.Variant, not str"),
    ({"variant": Variant("score * 2")}, ValueError, "`variant` must have a mask"),
    ({"variant": Variant(mask="j < n")}, ValueError, "`variant` lacks values"),
    ({"len_q": 4.0}, TypeError, "`len_q` must be an int, not 4.0"),
    ({"len_k": -1}, ValueError, "`len_k` must be from 0"),
    ({"heads": 0}, ValueError, "`heads` must be from 1"),
    ({"batch": True}, TypeError, "`batch` must be an int, not True"),
    ({"size": (64, 0)}, ValueError, "`size` must be at least 1"),
    ({"size": 1, "len_q": 2**20, "len_k": 2**20}, ValueError, r"fewer than 2\*\*33 blocks"),
    ({"size": 6.4}, TypeError, "`size` must be an int or a pair"),
    ({"q_start": np.zeros(2, int)}, TypeError, "`q_start` must be an int"),
    ({"q_start": 2**30}, ValueError, "`q_start` must be from"),
    ({"like": np.zeros(2, int)}, TypeError, "`like` must have dtype float16 or"),
    ({"like": "numpy"}, TypeError, "`like` is a str"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_arguments(change, error, words):
    good = {"variant": Variant(mask="j <= i"), "len_q": 4, "len_k": 4}
    with pytest.raises(error, match=words):
        BlockMask.of(**{**good, **change})


# Many calls.


def test_keys_of_known_calls_tell_what_blocks_are_for():
    causal = Variant(mask="j <= i")
    masks = [BlockMask.of(causal, n, 200, q_start=start) for n in (190, 191) for start in (0, 1)]
    masks += [BlockMask.of(causal, 190, 200, q_start=0, size=256)]
    assert len({mask.key for mask in masks}) == len(masks)
    assert BlockMask.of(causal, 190, 200, q_start=0).key == masks[0].key


def test_known_calls_are_made_again(cp):
    made = Drawn("documents", 0, 300, 300, None, 128)
    arrays, mask = inputs(cp, 300, 300, dtype="float16"), made.blocks(cp)
    first = host(cuflash.attention(*arrays, variant=mask))
    known = dict(repeat._known)
    for _ in range(100):
        np.testing.assert_array_equal(host(cuflash.attention(*arrays, variant=mask)), first)
    again = made.blocks(cp)  # of another mask's memory
    np.testing.assert_array_equal(host(cuflash.attention(*arrays, variant=again)), first)
    assert dict(repeat._known) == known


def test_explain_and_warmup(xp):
    made = Drawn("causal", 0, 300, 300, None, 128)
    arrays, mask = inputs(xp, 300, 300), made.blocks(xp)
    kernels = cuflash.warmup(cuflash.attention, *arrays, variant=mask)
    of = made.variant(xp), 300, 300
    looking = cuflash.warmup(BlockMask.of, *of, like=arrays[0])
    assert (kernels, looking) == ((0, 0) if xp is np else (2, 1))
    assert cuflash.explain(BlockMask.of, *of, like=arrays[0]).startswith("BlockMask.of: ")
    cuflash.explain(cuflash.attention, *arrays, variant=mask)


# Plans and kernels: no GPU is needed.


def asked(variant: Variant, dtype: str, d: int, **sizes: Any) -> Any:
    """A problem of ordinary size, of arrays that are not there."""
    x = np.broadcast_to(np.zeros((), dtype), (2, HEADS, 768, 8))
    made = prepare(x, x, x, variant=variant)[1].variant
    sizes = {"len_q": 768, "len_k": 768, "heads": HEADS, "kv_heads": 1, "right": None} | sizes
    return dataclasses.replace(problem(dtype, d, d), variant=made, **sizes)


def planned(variant: Variant, arch: int, dtype: str, d: int, **sizes: Any) -> plan.AttentionPlan:
    return plan.choose(asked(variant, dtype, d, **sizes), gpu.of_arch(arch), dtype)


def tile(chosen: plan.AttentionPlan) -> tuple[int, int]:
    constants = dict(chosen.kernel.constants)
    return int(constants["kBlockM"]), int(constants["kBlockN"])


def own_blocks(size: int) -> BlockMask:
    return BlockMask(np.ones((HEADS, *(2 * [-(-768 // size)])), bool), size)


@pytest.mark.parametrize("d", plan.BUCKETS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiles_divide_blocks(arch, d):
    for dtype in ("float16", "float32", "float64"):
        chosen: plan.AttentionPlan | None = planned(own_blocks(128), arch, dtype, d)
        while chosen is not None:
            rows, keys = tile(chosen)
            assert 128 % rows == 0, chosen
            assert 128 % keys == 0, chosen
            assert chosen.pack == 1
            assert dict(chosen.kernel.constants)["kWholeBlocks"]
            chosen = chosen.narrower


def test_tiles_of_hopper():
    causal = Variant(mask="j <= i")
    sized = lambda size: BlockMask.of(causal, 768, 768, size=size)
    ordinary = {d: tile(planned(causal, 90, "float16", d)) for d in plan.BUCKETS}
    assert ordinary[64] == (192, 128)
    assert tile(planned(sized(128), 90, "float16", 64)) == (128, 128)
    assert tile(planned(sized(384), 90, "float16", 64)) == ordinary[64]
    assert tile(planned(sized(128), 90, "float16", 128)) == ordinary[128]
    assert tile(planned(sized(128) & sized(64), 90, "float16", 64)) == ordinary[64]  # none divides
    constants = dict(planned(own_blocks(100), 90, "float16", 64).kernel.constants)
    assert constants["kWholeBlocks"] is False
    assert "kWholeBlocks" not in dict(planned(sized(128), 90, "float16", 64).kernel.constants)


def test_heads_are_packed_where_their_blocks_are_one():
    sizes = {"heads": 16, "kv_heads": 1, "len_q": 8, "batch": (64,)}
    causal = BlockMask.of(Variant(mask="j <= i"), 768, 768)
    assert planned(causal, 90, "float16", 128, **sizes).pack > 1
    assert planned(own_blocks(128), 90, "float16", 128, **sizes).pack == 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_without_spills(arch):
    pytest.importorskip("cupy", reason="needs CuPy and NVRTC, but no GPU")
    from cuflash._attention import gpu as engine

    of_causal = BlockMask.of(Variant(mask="j <= i"), 768, 768)
    for variant, d in ((own_blocks(128), 128), (of_causal, 64)):
        chosen: plan.AttentionPlan = planned(variant, arch, "float16", d)
        while chosen.narrower and compile.cubin(chosen.kernel, arch).spills:
            chosen = chosen.narrower  # as it settles
        if (arch, d) == (75, 128):  # its last tile: no other one is narrower
            assert compile.cubin(chosen.kernel, arch).spills <= 16
            continue
        check(chosen, arch)
        assert arch != 90 or tile(chosen) == (128, 128)
    seen = Variant(mask="seen[h, row, j] and doc[b, i] == doc[b, j]")
    seen = seen(seen=np.ones((HEADS, 768, 768), bool), doc=np.zeros((2, 768), np.int32))
    check(plan_around.tiles(asked(seen, "float16", 64), planned(seen, arch, "float16", 64)), arch)
    if arch == 90:
        many = dataclasses.replace(asked(seen, "float16", 64), batch=(99,))
        ordering = plan_around.order(many, plan.choose(many, gpu.of_arch(90), "float16"))
        assert ordering is not None
        check(ordering, arch)
    every = block_kinds.prepare(seen, 768, 768, heads=HEADS, batch=2).problem
    size = engine.blocks_dtype("float32", every.variant).itemsize
    check(plan_around.block_kinds(every), arch)
    sized = f"static_assert(sizeof(Params) == {size});"
    compile.cubin(plan_around.block_kinds(every).kernel, arch, also=sized)


def test_bits_are_shared_where_a_mask_is_one(monkeypatch):
    """By heads and entries along which arrays broadcast."""
    pytest.importorskip("cupy", reason="the host side of the kernels imports CuPy")
    from cuflash._attention import gpu as engine

    x = np.ones((3, 2, 4, 300, 8), np.float16)
    one = np.ones((300, 300), bool)
    shapes = {(): (0, 0), (4,): (0, 1), (2, 1): (1, 0), (3, 1, 4): (1, 1), (3, 2, 4): (1, 1)}
    for front, differ in shapes.items():
        mask = np.ones((*front, 300, 300), bool) if front else one
        _, whole, operands = prepare(x, x, x, mask=mask)
        operands = dataclasses.replace(operands, out=x)
        shape, strides = engine.collapse(operands, whole.variant)
        whole = dataclasses.replace(whole, batch=shape[-engine.BATCH_AXES :])
        chosen = plan.choose(whole, gpu.of_arch(80), "float16")
        bits = np.zeros((), engine._TILE_BITS)
        nbytes = engine.fill_tile_bits(bits, whole, chosen, operands, strides)
        words = plan.query_tiles(whole, chosen) * 2 * plan.tile_words(whole, chosen)
        entries = front[:-1] if len(front) > 1 else ()
        copies = int(np.prod(entries)) * (front[-1] if front else 1)
        assert (bool(bits["batch"].any()), bool(bits["head"])) == differ
        assert nbytes == engine._COUNTER_BYTES + 4 * words * copies

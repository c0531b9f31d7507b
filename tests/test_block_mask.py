"""Block-sparse attention: a BlockMask is the boolean mask of its blocks."""

from __future__ import annotations

import numpy as np
import pytest
import tolerance
from calling import attend, host, judge
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, Problem, materialise

import cuflash
from cuflash import BlockMask

FORMS = {2: (), 3: (2,), 4: (3, 2)}  # axes of blocks -> batch and heads in front of the two


def spread(blocks: np.ndarray, size: tuple[int, int], len_q: int, len_k: int) -> np.ndarray:
    """The mask of single scores."""
    rows = np.repeat(np.repeat(blocks, size[0], axis=-2), size[1], axis=-1)
    return rows[..., :len_q, :len_k]


@pytest.mark.parametrize("axes", FORMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@given(data=st.data())
def test_blocks_are_a_mask(xp, dtype, axes, data):
    size = data.draw(st.sampled_from([(1, 1), (64, 64), (128, 128), (48, 80), (7, 200)]))
    len_q, len_k = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    seed, causal = data.draw(st.integers(0, 99)), data.draw(st.booleans())
    sides = {"group": 2, "len_q": len_q, "len_k": len_k}
    call = materialise(Problem(seed, dtype, (3,), ((False,),) * 3, causal=causal, **sides))
    random = np.random.default_rng(seed)
    front = [data.draw(st.sampled_from([1, n])) for n in FORMS[axes]]
    blocks = random.random((*front, -(-len_q // size[0]), -(-len_k // size[1]))) < 0.4
    truth = judge(call, mask=spread(blocks, size, len_q, len_k))
    truth.check(*attend(call, xp, variant=BlockMask(xp.asarray(blocks), size)))


def test_joined_with_others(xp):
    q, k, v = (xp.asarray(x) for x in np.random.default_rng(0).standard_normal((3, 2, 40, 8)))
    blocks = np.random.default_rng(1).random((5, 5)) < 0.5
    both = BlockMask(xp.asarray(blocks), 8) & cuflash.Variant(mask="abs(i - j) < 20")
    near = abs(np.arange(40)[:, None] - np.arange(40)) < 20
    expected = cuflash.attention(q, k, v, mask=xp.asarray(spread(blocks, (8, 8), 40, 40) & near))
    np.testing.assert_allclose(
        host(cuflash.attention(q, k, v, variant=both)), host(expected), rtol=1e-12, atol=1e-12
    )


def test_patterns():
    local = BlockMask.local_global(5, 6, local=1, leading=2)
    strided, butterfly = BlockMask.strided(7, 9, 3), BlockMask.butterfly(8, 16)
    for i, j in np.ndindex(5, 6):
        assert local[i, j] == (abs(i - j) <= 1 or i < 2 or j < 2)
    for i, j in np.ndindex(7, 9):
        assert strided[i, j] == (abs(i - j) < 3 or (i - j) % 3 == 0)
    for i, j in np.ndindex(8, 16):
        assert butterfly[i, j] == (bin(i ^ j).count("1") <= 1)


@pytest.mark.parametrize(
    ("blocks", "size", "error", "words"),
    [
        ([[True]], 64, TypeError, "`blocks` must be an array of 2, 3 or 4 axes"),
        (np.ones(3, bool), 64, TypeError, "of shape \\(3,\\)"),
        (np.ones((1, 1, 1, 1, 1), bool), 64, TypeError, "2, 3 or 4 axes"),
        (np.ones((1, 1), bool), 64.0, TypeError, "`size` must be an int or a pair"),
        (np.ones((1, 1), bool), True, TypeError, "`size` must be an int or a pair"),
        (np.ones((1, 1), bool), (64, 64, 64), TypeError, "`size` must be an int or a pair"),
        (np.ones((1, 1), bool), (64, 0), ValueError, "`size` must be at least 1"),
    ],
)
def test_what_is_no_block_mask(blocks, size, error, words):
    with pytest.raises(error, match=words):
        BlockMask(blocks, size)


@pytest.mark.parametrize(
    ("blocks", "error", "words"),
    [
        (np.ones((2, 3), bool), ValueError, "`variant's blocks` must have shape \\(..., 3, 3\\)"),
        (np.ones((3, 4), bool), ValueError, "`variant's blocks` must have shape \\(..., 3, 3\\)"),
        (np.ones((3, 3, 3), bool), ValueError, "1 or 2 along its axis of heads, not 3"),
        (np.ones((4, 2, 3, 3), bool), ValueError, "1 or 1 along its axis of batch, not 4"),
        (np.ones((3, 3), "int32"), TypeError, "`variant's blocks` must have dtype bool"),
    ],
)
def test_blocks_that_do_not_fit(xp, blocks, error, words):
    q = xp.ones((2, 40, 8), "float32")
    with pytest.raises(error, match=words):
        cuflash.attention(q, q, q, variant=BlockMask(xp.asarray(blocks), 16))


@pytest.mark.parametrize(("batch", "kv_heads"), [(1, 96), (3, 1)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_long_rows_among_short_ones(cp, dtype, batch, kv_heads):
    """More query tiles than a GPU has places: those with most blocks come before their turn."""
    blocks = cuflash.BlockMask.local_global(8, 8, local=0, leading=1)
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((1, 1, 1000, 64)).astype(DTYPES[dtype]) for _ in range(3))
    many = cp.ascontiguousarray(cp.broadcast_to(cp.asarray(q), (batch, 96, 1000, 64)))
    keys, values = (cp.broadcast_to(cp.asarray(x), (1, kv_heads, 1000, 64)) for x in (k, v))
    variant = cuflash.BlockMask(cp.asarray(blocks), 128)
    out, lse = cuflash.attention(many, keys, values, variant=variant, return_lse=True)
    mask = np.kron(blocks, np.ones((128, 128), bool))[:1000, :1000]
    truth = tolerance.reference(q, k, v, mask=mask)
    truth.check(host(out)[:1, :1], host(lse)[:1, :1])
    assert (host(out).view(np.uint8) == host(out)[:1, :1].view(np.uint8)).all()
    assert (host(lse) == host(lse)[:1, :1]).all()


def test_query_tiles_with_any_number_of_blocks(cp):
    """More of them than a GPU has places: in whatever order, all are as their head's alone."""
    random = np.random.default_rng(0)
    q, k, v = (cp.asarray(x, "float16") for x in random.standard_normal((3, 96, 1000, 64)))
    blocks = cp.asarray(random.random((96, 8, 8)) < np.linspace(0, 1, 96)[:, None, None])
    out = cp.full(q.shape, np.nan, q.dtype)
    cuflash.attention(q, k, v, variant=BlockMask(blocks, 128), out=out)
    found = host(out)
    for head in range(96):
        own = slice(head, head + 1)
        alone = BlockMask(blocks[own], 128)
        expected = cuflash.attention(q[own], k[own], v[own], variant=alone)
        assert (found[own].view(np.uint8) == host(expected).view(np.uint8)).all()

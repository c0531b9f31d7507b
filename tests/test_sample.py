"""cuflash.sample: the distribution of many draws, what may never be drawn, and reproducibility.

Many draws from one row are one call: the row is broadcast, which takes no memory.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from poison import poison
from scipy import stats
from softmax_problems import place
from strategies import DTYPES

import cuflash
from cuflash.philox import philox

FILTERS = {
    "all": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_k 1": {"top_k": 1},
    "top_p": {"top_p": 0.7},
    "small top_p": {"top_p": 0.05},
    "min_p": {"min_p": 0.3},
    "min_p 1": {"min_p": 1},
    "top_k top_p": {"top_k": 9, "top_p": 0.5},
    "top_p min_p": {"top_p": 0.9, "min_p": 0.2},
    "all of them": {"top_k": 20, "top_p": 0.8, "min_p": 0.1, "temperature": 1.5},
}
# Around the edges of vectors, threads, warps, blocks and slices.
LENGTHS = (
    1,
    2,
    7,
    8,
    9,
    31,
    32,
    33,
    63,
    127,
    128,
    129,
    255,
    256,
    257,
    511,
    512,
    513,
    1000,
    1023,
    1024,
)
LONG = (1025, 2047, 2049, 4096, 4097, 8200, 16384, 16400, 32000, 50257, 131072)


def host(array):
    return array.get() if hasattr(array, "get") else np.asarray(array)


def probabilities(row, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The distribution by its definition: sort, cut, renormalise, in float64."""
    row = np.asarray(row, np.float64)
    order = np.argsort(-row, kind="stable")[:top_k]
    with np.errstate(over="ignore"):
        weights = np.exp((row[order] - row.max()) / temperature)
    keep = weights > 0
    if top_p is not None:
        keep &= np.cumsum(weights) - weights < top_p * weights.sum()
    if min_p is not None:
        keep &= weights >= min_p
    p = np.zeros(row.size)
    p[order] = np.where(keep, weights, 0)
    return p / p.sum()


def normal(columns, seed=0, dtype="float32", scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(columns)).astype(DTYPES[dtype])


def draws(row, count, xp, **options):
    poison(xp)
    many = xp.broadcast_to(xp.asarray(row), (count, len(row)))
    tokens = cuflash.sample(many, **{"seed": 1, **options})
    assert isinstance(tokens, xp.ndarray)
    assert tokens.dtype == np.int64
    assert tokens.shape == (count,)
    return host(tokens)


def fits(tokens, p):
    """Tokens are drawn as often as they should be, and excluded ones never."""
    seen = np.bincount(tokens, minlength=p.size)
    assert seen.size == p.size
    assert not seen[p == 0].any()
    expected = p * tokens.size
    rare = (expected < 10) & (p > 0)  # a chi-square wants more: joined into one
    cells = [(seen[i], expected[i]) for i in np.flatnonzero(~rare & (p > 0))]
    if rare.any():
        cells.append((seen[rare].sum(), expected[rare].sum()))
    if len(cells) > 1:
        assert stats.chisquare(*zip(*cells), sum_check=False).pvalue > 1e-5


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_distribution_is_that_of_the_definition(xp, dtype, options):
    row = normal(40, dtype=dtype)
    fits(draws(row, 100_000, xp, **options), probabilities(row, **options))


@pytest.mark.parametrize("options", [{}, {"top_p": 0.6}, {"top_k": 3}], ids=str)
def test_the_distribution_over_a_million_draws(xp, options):
    row = normal(6)
    fits(draws(row, 1_000_000, xp, **options), probabilities(row, **options))


@pytest.mark.parametrize(
    "options", [FILTERS["all"], FILTERS["top_p"], FILTERS["top_p min_p"]], ids=str
)
@pytest.mark.parametrize("columns", [300, 1500, 5000, 20000])
def test_the_distribution_of_longer_rows(xp, columns, options):
    """A few likely tokens in different slices, and a mass of unlikely ones."""
    count = 200_000 if xp is not np else 600_000 // (columns // 300 * 30)
    row = normal(columns)
    row[np.random.default_rng(3).integers(0, columns, 12)] += np.log(columns)
    fits(draws(row, count, xp, **options), probabilities(row, **options))


def test_ties_go_to_the_lowest_index(xp):
    row = np.array([0, 2, 1, 2, 1, 2, 1, 1], np.float32)
    assert set(draws(row, 2000, xp, top_k=2)) == {1, 3}
    assert set(draws(row, 2000, xp, top_k=4)) == {1, 2, 3, 5}
    assert set(draws(row, 2000, xp, top_k=5)) == {1, 2, 3, 4, 5}
    assert set(draws(row, 2000, xp, min_p=0.9)) == {1, 3, 5}
    level = np.zeros(1000, np.float32)
    assert set(draws(level, 20_000, xp, top_p=0.0099)) == set(range(10))
    assert set(draws(level, 2000, xp, top_p=1e-9)) == {0}
    assert set(draws(level, 2000, xp, top_k=8, top_p=0.3)) == {0, 1, 2}


def test_what_has_no_weight_is_never_drawn(xp):
    row = np.full(5000, -np.inf, np.float32)
    row[[3, 1024, 4999]] = [0, 1e4, 1e4]
    for options in FILTERS.values():
        allowed = np.flatnonzero(probabilities(row, **options))
        assert set(draws(row, 500, xp, **options)) <= set(allowed)
        # A few tokens among many that are excluded, wherever they stand.
        for columns in (25, 40, 1100):
            few = np.full(columns, -np.inf, np.float32)
            few[[columns // 2, columns - 2]] = 0, 1
            assert set(draws(few, 2000, xp, **options)) <= {columns // 2, columns - 2}


@pytest.mark.parametrize("columns", LENGTHS + LONG)
def test_every_length_finds_its_token(xp, columns):
    """One token carries nearly all mass, at every place in turn; and a whole row is drawn from."""
    places = sorted({0, 1, 15, 16, 17, columns // 3, columns // 2, columns - 2, columns - 1})
    places = [place for place in places if 0 <= place < columns]
    rows = np.zeros((len(places), columns), np.float32)
    rows[range(len(places)), places] = 60
    for dtype, options in itertools.product(DTYPES, ({}, {"top_p": 0.5}, {"min_p": 0.1})):
        x = xp.asarray(rows.astype(DTYPES[dtype]))
        poison(xp)
        tokens = host(cuflash.sample(x, seed=5, **options))
        np.testing.assert_array_equal(tokens, places)
    level = xp.broadcast_to(xp.zeros(columns, "float32"), (200, columns))
    tokens = host(cuflash.sample(level, seed=5))
    assert tokens.min() >= 0
    assert tokens.max() < columns
    assert columns < 100 or len(set(tokens.tolist())) > 50


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4, 1e37])
def test_magnitudes(xp, dtype, scale):
    if dtype == "float16" and scale > 1e4:
        pytest.skip("float16 ends at 65504")
    row = normal(200, dtype=dtype, scale=scale)
    for options in ({}, {"top_p": 0.9}, {"temperature": scale}, {"temperature": 1e-300}):
        if scale == 1e37 and options.get("temperature") == scale:
            continue  # the difference of logits overflows before it is divided
        p = probabilities(row, **options)
        tokens = draws(row, 20_000, xp, **options)
        if scale < 1e37:
            fits(tokens, p)
        else:
            assert set(tokens) == {int(row.argmax())}


def test_temperature_0_is_argmax(xp):
    rows = np.random.default_rng(0).integers(0, 9, (50, 300)).astype(np.float32)
    rows[3, 7] = rows[4, 2] = rows[4, 100] = np.nan
    rows[5] = -np.inf
    rows[6, 20:22] = np.inf
    tokens = cuflash.sample(xp.asarray(rows), seed=0, temperature=0, top_k=3, top_p=0.5)
    np.testing.assert_array_equal(host(tokens), rows.argmax(axis=1))


def test_very_hot_is_uniform(xp):
    row = np.array([0, 5, -np.inf, 1], np.float32)
    fits(draws(row, 30_000, xp, temperature=1e300), np.array([1, 1, 0, 1]) / 3)


# Random numbers.


def test_philox_gives_the_known_answers():
    """From Random123's kat_vectors."""
    words = lambda text: np.array([int(word, 16) for word in text.split()], np.uint32)
    pi = "243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0"
    ones = "ffffffff " * 4, "ffffffff ffffffff"
    for (counter, key), rounds, answer in [
        (("0 0 0 0", "0 0"), 7, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (("0 0 0 0", "0 0"), 10, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (ones, 7, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (ones, 10, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (pi, 7, "4dfccaba 190a87f0 c47362ba b6b5242a"),
        (pi, 10, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]:
        got = philox(words(counter), words(key), rounds)
        np.testing.assert_array_equal(got, words(answer))


def test_the_seed_offset_and_row_are_what_decides(xp):
    row = np.zeros(1000, np.float32)
    first = draws(row, 5000, xp)
    np.testing.assert_array_equal(first, draws(row, 5000, xp))
    np.testing.assert_array_equal(first[:77], draws(row, 77, xp))
    large = 2**64 - 1
    others = [
        draws(row, 5000, xp, seed=seed, offset=offset)
        for seed, offset in [(2, 0), (1, 1), (1 << 32, 0), (1, 1 << 32), (large, large), (0, 1)]
    ]
    for one, other in itertools.combinations([first, *others], 2):
        assert (one == other).mean() < 0.01
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.07
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.07


def test_steps_of_one_row_are_independent(xp):
    row = xp.zeros((1, 10), "float32")
    tokens = np.array([int(cuflash.sample(row, seed=3, offset=i)[0]) for i in range(1000)])
    fits(tokens, np.full(10, 0.1))
    fits(tokens[1:] * 10 + tokens[:-1], np.full(100, 0.01))


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("columns", [63, 1000, 4000, 10000, 40000])
def test_numpy_and_cuda_draw_the_same(cp, columns, options):
    for dtype in DTYPES:
        count = max(30, min(300, 300_000 // columns))
        rows = np.stack([normal(columns, seed, dtype, 3.0) for seed in range(count)])
        want = cuflash.sample(rows, seed=9, offset=4, **options)
        got = cuflash.sample(cp.asarray(rows), seed=9, offset=4, **options).get()
        assert (got != want).mean() <= 0.01, dtype


@pytest.mark.parametrize("columns", [63, 3000, 70000])
def test_the_same_bits_every_time(cp, columns):
    x = cp.asarray(normal(64 * columns).reshape(64, columns))
    for options in ({}, {"top_p": 0.3}, {"top_k": 50, "top_p": 0.9}):
        tokens = {cuflash.sample(x, seed=2, **options).tobytes() for _ in range(50)}
        assert len(tokens) == 1


# Axes, strides, kinds.


@pytest.mark.parametrize(
    "layout", ["contiguous", "permuted", "gaps", "unaligned", "negative", "steps"]
)
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_axes_and_strides(xp, layout, axis):
    """Every layout draws what the contiguous one does."""
    logits = np.random.default_rng(0).standard_normal((9, 40, 70)).astype(np.float32) * 3
    rows = np.ascontiguousarray(np.moveaxis(logits, axis, -1))
    for options in ({}, {"top_k": 7}, {"top_p": 0.8}, {"temperature": 0}):
        want = cuflash.sample(rows, seed=11, **options)
        x, buffer = place(logits, layout, xp)
        before = host(buffer).tobytes()
        got = cuflash.sample(x, seed=11, axis=axis, **options)
        assert got.shape == want.shape
        assert (host(got) != want).mean() <= 0.01
        assert host(buffer).tobytes() == before


@pytest.mark.parametrize("shift", range(1, 8))
@pytest.mark.parametrize("columns", [50, 1022, 9001])
def test_unaligned_rows(xp, shift, columns):
    """Rows that begin anywhere, with NaN next to them."""
    for dtype in ("float16", "float32", "float64"):
        logits = normal(columns * 6, dtype=dtype, scale=3).reshape(6, columns)
        memory = np.full((6, columns + shift + 1), np.nan, dtype)
        memory[:, shift : shift + columns] = logits
        x = xp.asarray(memory)[:, shift : shift + columns]
        for options in ({}, {"top_p": 0.9}):
            want = cuflash.sample(logits, seed=3, **options)
            np.testing.assert_array_equal(host(cuflash.sample(x, seed=3, **options)), want)


def test_shapes_and_kinds(xp):
    x = xp.zeros((2, 3, 4))
    assert cuflash.sample(x, seed=0).shape == (2, 3)
    assert cuflash.sample(x, seed=0, axis=0).shape == (3, 4)
    assert cuflash.sample(xp.zeros((0, 4)), seed=0).shape == (0,)
    assert cuflash.sample(xp.zeros((3, 1)), seed=0).tolist() == [0, 0, 0]
    scalar = cuflash.sample(xp.zeros(4), seed=0)
    assert isinstance(scalar, np.int64 if xp is np else xp.ndarray)
    assert scalar.shape == ()
    assert cuflash.sample(xp.zeros(()), seed=0) == 0
    assert cuflash.sample(xp.asarray([[0, 100], [100, 0]]), seed=0).tolist() == [1, 0]
    assert cuflash.sample(xp.asarray([False, True]), seed=0, temperature=0.001) == 1


def test_lists_and_numpy_numbers():
    assert cuflash.sample([0.0, 99.0], seed=np.uint64(2**64 - 1), temperature=np.float32(1)) == 1
    assert cuflash.sample([0.0, 99.0], seed=0, top_k=np.int8(1), top_p=np.float64(0.5)) == 1


def test_torch(require):
    torch = require("torch")
    tokens = cuflash.sample(torch.tensor([[0.0, 99.0], [99.0, 0.0]]), seed=0)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [1, 0]
    half = torch.tensor([[0.0, 99.0], [99.0, 0.0]], dtype=torch.bfloat16)
    assert cuflash.sample(half, seed=0, top_k=1).tolist() == [1, 0]


def test_torch_on_a_gpu(require):
    torch = require("torch-cuda")
    tokens = cuflash.sample(torch.eye(3, device="cuda") * 99, seed=0, top_k=2, top_p=0.9)
    assert tokens.is_cuda
    assert tokens.tolist() == [0, 1, 2]


# Rows without a distribution.


def undrawable(columns):
    rows = np.zeros((6, columns), np.float32)
    rows[1] = -np.inf
    rows[2, columns // 2] = np.nan
    rows[3, columns - 1] = np.inf
    rows[4, 0] = -np.inf
    return rows


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("columns", [21, 1000, 3000, 30000])
def test_rows_without_a_distribution(xp, columns, options, monkeypatch):
    rows = undrawable(columns)
    for dtype in DTYPES:
        typed = rows.astype(DTYPES[dtype])
        for each in (1, 2, 3):
            x = xp.asarray(typed[[0] * (each - 1) + [each]])
            if xp is not np:
                monkeypatch.setenv("CUFLASH_CHECK", "1")
            with pytest.raises(ValueError, match=rf"`logits` must .* row \({each - 1},\)"):
                cuflash.sample(x, seed=0, **options)
        if xp is not np:
            monkeypatch.delenv("CUFLASH_CHECK")
            tokens = host(cuflash.sample(xp.asarray(typed), seed=0, **options))
            assert (tokens[1:4] == -1).all()
            assert (tokens[[0, 4, 5]] >= 0).all()

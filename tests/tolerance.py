"""How far an answer may be from the truth: one rule for each row.

A row of out may be twice as far from the truth as the worst of a few plain evaluations in the
same precision is (see `oracle.baselines`), plus a floor. A rule over the whole tensor would let a
wrong row hide behind the largest one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import oracle

# Unit roundoff of each dtype: half the distance from 1 to the next number.
ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}

# The floor, in units of a row's sum of p |v|. A plain evaluation may be right to the last bit by
# luck: a quarter of a unit lets another one round the other way.
FLOOR = {name: unit / 4 for name, unit in ROUNDOFF.items()}
# On tensor cores a float32 operand is split into two TF32 parts, 11 + 11 bits of its 24: up to
# one unit in its last place is lost.
FLOOR["float32"] = 2.0**-23
# In float64 nothing is rounded to fewer bits than the sums themselves, so that the roundings of
# P, of the sums and of the division count alike.
FLOOR["float64"] = 2.0**-52
# One TF32 part only, 11 bits, cut off and not rounded.
FLOOR_TF32 = 2.0**-10

# A score in float32 (float64) carries a few roundings of its own: of the scale, of q or k (one
# unit in the last place each when they are split), of the product with log2(e). A plain evaluation
# may escape them, so that four units of the sum of |q k|, and of what variants add, are allowed:
# oracle.DOUBT. Only for float32 and float64, and behind an approximate tanh, is it more than the
# floor.

# CUDA code is compiled with flush-to-zero: float32 (and bfloat16) below the smallest normal
# number is 0, and what a weight below it would have brought is lost too: oracle.Answer.flushed.
# float16 keeps its subnormals, whose spacing then is the smallest step.
ABSOLUTE = {"float16": 2.0**-24, "bfloat16": 1.2e-38, "float32": 1.2e-38, "float64": 5e-324}

# lse = m + log(sum): the scores before it are sums of products rounded to float32.
LSE = {"float16": 1e-5, "bfloat16": 1e-5, "float32": 1e-5, "float64": 1e-13}

# With fewer columns of v than this a row's largest error is a matter of luck.
COLUMNS = 16


@dataclass(frozen=True)
class Reference:
    """The truth about one call, and how far from it one may be."""

    out: np.ndarray  # [*batch, heads, len_q, d_v]
    lse: np.ndarray  # [*batch, heads, len_q]
    out_limit: np.ndarray  # [*batch, heads, len_q, 1]
    lse_limit: np.ndarray  # [*batch, heads, len_q]
    mass: np.ndarray  # [*batch, heads, len_q, 1], the largest sum of p |v| of each row
    allowed: np.ndarray  # [*batch, heads or 1, len_q, len_k]

    def check(self, out: np.ndarray, lse: np.ndarray | None = None) -> None:
        """Assert that NumPy arrays `out` and `lse` are good."""
        assert_close("out", out, self.out, self.out_limit)
        if lse is not None:
            assert_close("lse", lse, self.lse, self.lse_limit)


def reference(q, k, v, *, precision=None, out_dtype=None, **options) -> Reference:
    """Judge one call by the arguments of `cuflash.attention`, as NumPy arrays."""
    name = q.dtype.name
    columns = v.shape[-1]
    v = with_witnesses(v)
    truth = oracle.attention(q, k, v, **options)
    mass = truth.mass.max(axis=-1, keepdims=True)
    out_error = np.zeros_like(mass)
    lse_error = np.zeros(truth.lse.shape)
    out_dtype = np.dtype(q.dtype if out_dtype is None else out_dtype)
    # Where the truth happens to be a 16-bit number a plain evaluation is rounded to just that, and
    # one as good, to its neighbour: what the rounding of out may add is added at its largest.
    rounding = ROUNDOFF[out_dtype.name] * finite(truth.out) if out_dtype.itemsize == 2 else 0.0
    for out, lse in oracle.baselines(q, k, v, precision=precision, **options):
        error = distance(out, truth.out) + np.abs(rounding)
        out_error = np.maximum(out_error, error.max(axis=-1, keepdims=True, initial=0))
        lse_error = np.maximum(lse_error, distance(lse, truth.lse))
    floor = FLOOR_TF32 if precision == "tf32" else FLOOR[name]
    score = oracle.DOUBT["float64" if name == "float64" else "float32"]
    out_doubt = score * finite(truth.out_doubt.max(axis=-1, keepdims=True))
    lse_doubt = score * finite(truth.lse_doubt)
    absolute = ABSOLUTE[name]
    if name in ("bfloat16", "float32"):
        absolute = absolute + finite(truth.flushed.max(axis=-1, keepdims=True))
    size = np.where(np.isfinite(truth.lse), np.abs(truth.lse), 1).astype(np.float64)
    return Reference(
        out=truth.out[..., :columns],
        lse=truth.lse,
        out_limit=2 * out_error + floor * finite(mass) + out_doubt + absolute,
        lse_limit=np.maximum(LSE[name] * np.maximum(1, size), 2 * lse_error + lse_doubt),
        mass=finite(mass),
        allowed=truth.allowed,
    )


def with_witnesses(v: np.ndarray) -> np.ndarray:
    """v, with copies of other signs beside it while it has few columns.

    One column's error may be zero by luck; the copies have the same sums of p |v| and are
    rounded in other ways, so that the largest error of a row says what the arithmetic can do.
    """
    columns = v.shape[-1]
    signs = np.random.default_rng(columns).choice([-1, 1], (COLUMNS, *v.shape[-2:]))
    copies = [v * sign.astype(v.dtype) for sign in signs[: -(-COLUMNS // columns) - 1]]
    return np.concatenate([v, *copies], axis=-1)


def distance(got: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """|got - truth| in float64, 0 where either is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        return finite(np.abs(got.astype(truth.dtype) - truth).astype(np.float64))


def finite(x: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(x), x, 0)


def assert_close(name: str, got: np.ndarray, truth: np.ndarray, limit: np.ndarray) -> None:
    """Infinities and NaN in the same places first, then every element within its limit."""
    assert got.shape == truth.shape, f"{name} has shape {got.shape}, not {truth.shape}"
    wide = got.astype(truth.dtype)
    for what, same in (
        ("NaN", np.isnan(wide) == np.isnan(truth)),
        ("+inf", np.isposinf(wide) == np.isposinf(truth)),
        ("-inf", np.isneginf(wide) == np.isneginf(truth)),
    ):
        assert same.all(), f"{name}: {what} in other places: {sample(~same, wide, truth)}"
    error = distance(wide, truth)
    limit = np.broadcast_to(limit, error.shape)
    wrong = error > limit
    if wrong.any():
        ratio = error / np.where(limit > 0, limit, np.finfo(float).tiny)
        worst = np.unravel_index(ratio.argmax(), ratio.shape)
        raise AssertionError(
            f"{name}: {wrong.sum()} of {wrong.size} elements too far off; the worst, at "
            f"{tuple(map(int, worst))}: {wide[worst]!r}, not {truth[worst]!r}: off by "
            f"{error[worst]:.3g}, {limit[worst]:.3g} allowed"
        )


def sample(where: np.ndarray, got: np.ndarray, truth: np.ndarray) -> str:
    at = tuple(int(axis[0]) for axis in np.nonzero(where))
    return f"{where.sum()} of {where.size}; at {at}: {got[at]!r}, not {truth[at]!r}"

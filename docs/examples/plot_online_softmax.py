"""
The running pair of a softmax
=============================

Softmax looks like it needs two reads of a row: one for the maximum, one for the sum of the
exponentials. One read is enough, and everything in cuflash rests on how.
"""

# %%
# For numbers :math:`x_1, x_2, \ldots` keep the pair :math:`m` (the largest so far) and :math:`d`
# (the sum of :math:`e^{x_i - m}` so far). A larger maximum makes the old sum too large by
# :math:`e^{m_\text{new} - m}`, so it is scaled down, and nothing has to be read again
# (Milakov and Gimelshein, *Online normalizer calculation for softmax*, Algorithm 3):

import matplotlib.pyplot as plt
import numpy as np

import cuflash

Pair = tuple[float, float]
EMPTY: Pair = (-np.inf, 0.0)


def update(pair: Pair, x: float) -> Pair:
    """Take one more number into the pair."""
    m, d = pair
    m_new = max(m, x)
    return m_new, d * np.exp(m - m_new) + np.exp(x - m_new)


rng = np.random.default_rng(seed=7)
row = 2 * rng.standard_normal(48) + np.linspace(-2, 4, 48)

pairs = [EMPTY]
for x in row:
    pairs.append(update(pairs[-1], x))

# %%
# The maximum climbs in steps, and at each step the sum drops. Together they always tell
# :math:`m + \log d`, the logarithm of the sum of the exponentials so far. The sum itself would
# overflow for numbers above 709 (88 in float32); the pair never does, since :math:`d` is at most
# the count of numbers read.

m, d = np.array(pairs[1:]).T
step = np.arange(1, row.size + 1)

figure, (above, below) = plt.subplots(2, sharex=True, figsize=(8, 5.5), layout="constrained")
above.plot(step, row, "o", color="0.6", label="$x_i$")
above.step(step, m, where="post", color="tab:blue", label="running maximum $m$")
above.plot(step, m + np.log(d), color="tab:red", label=r"$m + \log d$")
above.legend(loc="lower right")
below.step(step, d, where="post", color="tab:green", label="running sum $d$")
below.set_xlabel("numbers read")
below.legend(loc="upper left")
plt.show()

# %%
# After the last number the pair holds all that the functions of this family need.

m, d = pairs[-1]
print(f"m + log(d)        {m + np.log(d):.12f}")
print(f"cuflash.logsumexp {cuflash.logsumexp(row):.12f}")
np.testing.assert_allclose(np.exp(row - m) / d, cuflash.softmax(row), rtol=1e-12)

# %%
# Two pairs merge by the same rule, so a row may be cut into pieces, read by many threads in any
# order, and put together at the end. The empty pair changes nothing. Attention keeps one thing
# more, the weighted sum of the values, and scales it down along with :math:`d`.


def merge(one: Pair, other: Pair) -> Pair:
    """Join the pairs of two pieces of a row."""
    m = max(one[0], other[0])
    return m, one[1] * np.exp(one[0] - m) + other[1] * np.exp(other[0] - m)


left, right = EMPTY, EMPTY
for x in row[:13]:
    left = update(left, x)
for x in row[13:]:
    right = update(right, x)

np.testing.assert_allclose(merge(left, right), (m, d), rtol=1e-12)
np.testing.assert_allclose(merge(right, left), (m, d), rtol=1e-12)
assert merge(left, EMPTY) == left

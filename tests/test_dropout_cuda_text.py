"""The CUDA C++ that decides what dropout drops, compiled for the CPU; needs g++."""

from __future__ import annotations

import ctypes
import shutil

import numpy as np
import oracle
import pytest
from emulated import compiled, header, pointer
from hypothesis import given
from hypothesis import strategies as st
from strategies import DROPOUT_SEEDS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

# A warp's lanes have their weights of a 16 x 16 block, and others have any.
_DRIVER = """
extern "C" void draw(const Dropping& dropping, uint32 row, uint32 key, bool* block, bool* each) {
  for (uint32 lane = 0; lane < 32; ++lane) {
    float upper[6], lower[6];
    for (int c = 0; c < 6; ++c) upper[c] = lower[c] = 1;
    const uint32 x = Dropping::row_place(row + lane / 4);
    const uint32 y = Dropping::key_place(key + lane % 4 * 2);
    dropping.drop(upper, lower, 1, x, y);
    for (int c = 0; c < 4; ++c) {
      bool* to = block + lane / 4 * 16 + c / 2 * 8 + lane % 4 * 2 + c % 2;
      to[0] = upper[1 + c] != 0;
      to[8 * 16] = lower[1 + c] != 0;
    }
    if (upper[0] != 1 || upper[5] != 1 || lower[0] != 1 || lower[5] != 1) abort();
  }
  for (uint32 i = 0; i < 256; ++i) each[i] = dropping.keeps(row + i / 16, key + i % 16);
}
"""
DROPPING = np.dtype(
    [("seed", "u8"), *((name, "u4") for name in ("threshold", "head", "entry"))], align=True
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    check = f"static_assert(sizeof(Dropping) == {DROPPING.itemsize});"
    code = "\n".join([header("_attention/dropout.cuh"), check, _DRIVER])
    return compiled(code, tmp_path_factory.mktemp("dropout"))


@given(
    seed=st.integers(0, 2**64 - 1) | st.sampled_from(DROPOUT_SEEDS),
    threshold=st.integers(1, 2**16 - 1),
    head=st.integers(0, 2**31 - 1),
    entry=st.integers(0, 2**32 - 1),
    tile=st.tuples(*[st.integers(0, 2**26 - 1) | st.integers(0, 9)] * 2),
)
def test_lanes_and_single_weights_decide_alike(library, seed, threshold, head, entry, tile):
    dropping = np.array((seed, threshold, head, entry), DROPPING)
    row, key = (16 * place for place in tile)
    block, each = np.empty((2, 16, 16), bool)
    library.draw(*map(pointer, (dropping,)), row, key, pointer(block), pointer(each))
    numbers = oracle.dropout_numbers(
        entry, head, row + np.arange(16)[:, None], key + np.arange(16), seed
    )
    np.testing.assert_array_equal(block, numbers >= threshold)
    np.testing.assert_array_equal(each, numbers >= threshold)

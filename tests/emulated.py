"""Variants' CUDA C++ on the CPU: compiled by g++, with stand-ins for what only CUDA has.

The headers and the generated text are the project's own, but for each `asm` statement, which
becomes a call of a C++ function that does what its instruction does. A quad of lanes runs one after
another, as often as it takes until each has what the others give it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from strategies import DTYPES

from cuflash._attention.variants.expression import Parameter
from cuflash._attention.variants.kinds import ARRAYS
from cuflash._attention.variants.program import Program
from cuflash.jit import source
from cuflash.jit.strides import address

KEYS = 32  # of a row, which four lanes share
BATCH_AXES = 4
BATCH, HEADS, LEN_Q, LEN_K, SCALE = (2, 2), 3, 11, 45, 0.375  # of all cases
TYPES = {"float32": "float", "float64": "double"}
_RANGE = np.dtype([("low", "f8"), ("high", "f8"), ("nan", "?")], align=True)
_BOUNDED = ("b", "h", "i", "row", "j", "len_q", "len_k")
AREA = np.dtype(  # the struct Area of interval.cuh
    [("entry", "i4", BATCH_AXES), *((name, _RANGE) for name in _BOUNDED)], align=True
)
# Where KEYS scores of a row stand, from `key` on.
ROW = np.dtype(
    [
        ("entry", "i4", BATCH_AXES),
        *((name, "i4") for name in ("b", "h", "i", "row", "key", "len_q", "len_k")),
        ("scale", "f8"),
    ],
    align=True,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A program, and the values of its slots."""

    program: Program
    values: tuple[Any, ...]

    def __str__(self) -> str:
        return " & ".join(x.score or x.mask or x.sink or "" for x in self.program.steps)

    def of_entry(self, b: int) -> list[Any]:
        """The values that one batch entry has."""
        entry = np.unravel_index(b, BATCH)
        return [
            value[entry] if kind.axes and value.ndim > kind.axes else value
            for kind, value in zip(self.program.slots, self.values)
        ]


@dataclasses.dataclass(frozen=True)
class Places:
    """Rows of scores, three of each batch entry; some keys are beyond the last."""

    rows: np.ndarray  # [12]
    scores: np.ndarray  # [12, KEYS], to be scaled

    @property
    def keys(self) -> np.ndarray:
        return self.rows["key"][:, None] + np.arange(KEYS)

    @property
    def exist(self) -> np.ndarray:
        return self.keys < LEN_K


def drawn_places(random: np.random.Generator) -> Places:
    entries = [each for each in np.ndindex(BATCH) for _ in range(3)]
    rows = np.zeros(len(entries), ROW)
    rows["entry"][:, 2:] = entries
    rows["b"] = np.ravel_multi_index(np.transpose(entries), BATCH)
    rows["h"] = random.integers(0, HEADS, len(rows))
    rows["row"] = random.integers(0, LEN_Q, len(rows))
    rows["i"] = rows["row"] + random.integers(-5, 40)
    rows["key"] = random.choice([0, 8, 16], len(rows))
    rows["len_q"], rows["len_k"], rows["scale"] = LEN_Q, LEN_K, SCALE
    scores = random.standard_normal((len(rows), KEYS)).astype(np.float32).astype(float) * 4
    scores[random.random(scores.shape) < 0.01] = random.choice([np.nan, np.inf, -np.inf, 0])
    return Places(rows, scores)


def drawn_array(random: np.random.Generator, parameter: Parameter) -> np.ndarray:
    """Of any dtype and layout, with and without batch axes, with keys enough and without."""
    dtype = random.choice([name for name, kind in ARRAYS.items() if kind == parameter.type])
    batch = BATCH if random.integers(2) else ()
    length = random.choice([random.integers(1, LEN_K), LEN_K, 48, 64])
    shape = (*batch, *random.integers(1, 9, parameter.axes - 1), length)
    layout = random.choice(["dense", "dense", "dense", "apart", "reversed", "turned", "repeated"])
    if layout == "apart":
        return contents(random, dtype, (*shape[:-1], 2 * length))[..., ::2]
    if layout == "reversed":
        return contents(random, dtype, shape)[..., ::-1]
    if layout == "turned":
        return contents(random, dtype, shape[::-1]).T
    if layout == "repeated":
        return np.broadcast_to(contents(random, dtype, (1, *shape[1:])), shape)
    return contents(random, dtype, shape)


def contents(random: np.random.Generator, dtype: str, shape: Sequence[int]) -> np.ndarray:
    if ARRAYS[dtype] == "bool":
        return random.random(shape) < 0.6
    if ARRAYS[dtype] == "float":
        return random.standard_normal(shape).astype(DTYPES[dtype])
    limits = np.iinfo(dtype)
    small = random.integers(max(-3, limits.min), 9, shape)
    large = random.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    return np.where(random.random(shape) < 0.9, small, large).astype(dtype)


_CUDA = """
#include <math.h>
#include <stdlib.h>
#include <string.h>
#define __device__
#define __forceinline__ inline
#define __expf expf
#define __logf logf

extern "C" {
extern long reads;
}
struct { unsigned x; } threadIdx;
template <typename To, typename From> To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
float __int_as_float(int x) { return same_bits<float>(x); }
float __uint_as_float(unsigned x) { return same_bits<float>(x); }
unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }
double __longlong_as_double(long long x) { return same_bits<double>(x); }
long reads;  // of elements, one by one
template <typename T> T __ldg(const T* from) {
  ++reads;
  return *from;
}
unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long bytes = (unsigned long long)y << 32 | x;
  unsigned found = 0;
  for (int n = 0; n < 4; ++n) {
    found |= unsigned(bytes >> (selector >> 4 * n & 7) * 8 & 255) << 8 * n;
  }
  return found;
}

// What each of four lanes gave at its n-th shuffle, when it last ran.
unsigned given[4][1024];
int shuffles;
unsigned __shfl_xor_sync(unsigned, unsigned x, int mask) {
  if (shuffles == 1024) abort();
  given[threadIdx.x][shuffles] = x;
  return given[threadIdx.x ^ mask][shuffles++];
}

namespace ptx {
template <int kBits, typename... Word> void load(const void* from, int exists, Word&... to) {
  const char* next = static_cast<const char*>(from);
  ((to = 0, exists ? memcpy(&to, next, kBits / 8) : nullptr, next += kBits / 8), ...);
}
void multiply(unsigned a, unsigned b, unsigned long long& product) {
  product = static_cast<unsigned long long>(a) * b;
}
void widen(unsigned short bits, float& to) {
  const int exponent = bits >> 10 & 31, rest = bits & 1023;
  to = exponent ? ldexpf(1024 + rest, exponent - 25) : ldexpf(rest, -24);
  if (exponent == 31) to = rest ? NAN : HUGE_VALF;
  to = copysignf(to, bits >> 15 ? -1 : 1);
}
}  // namespace ptx
"""
_DRIVER = """
struct Row {
  int entry[4];
  int b, h, i, row, key, len_q, len_k;
  double scale;
};

template <typename Reads, typename Variant, typename Coordinates>
void look_up(Reads (&lanes)[4], const Variant& variant, const Coordinates& at, int key) {
  Reads before[4];
  for (int lane = 0; lane < 4; ++lane) before[lane].load(variant, at, key + 8 * lane);
  int passes = 1;  // in pass n, the first n - 1 shuffles have what they should
  for (int pass = 0; pass < passes; ++pass) {
    for (int lane = 0; lane < 4; ++lane) {
      threadIdx.x = lane;
      shuffles = 0;
      lanes[lane] = before[lane];
      lanes[lane].exchange();
    }
    passes = shuffles + 1;
  }
}

// What a tile in shared memory has for the scores of a row, which is zeros beyond the array.
template <typename Reads, typename Variant, typename Coordinates>
void fetch(Reads (&lanes)[4], const Variant& variant, const Coordinates& at, int key) {
  if constexpr (Variant::kStreams) {
    const auto& array = variant.streamed();
    constexpr int kAxes = sizeof array.strides / sizeof *array.strides;
    const auto* row = array.begin(at.entry) + at.h * variant.streamed_head();
    row += at.row * array.stride(kAxes - 2);
    for (int lane = 0; lane < 4; ++lane) {
      lanes[lane].fetch([&](unsigned (&words)[4]) {
        for (int n = 0; n < 8; ++n) {
          const int column = key + n / 2 * 8 + lane * 2 + n % 2;
          const unsigned bits = column < array.lengths[kAxes - 1] ? row[column].bits : 0;
          words[n / 2] = n % 2 ? words[n / 2] | bits << 16 : bits;
        }
      });
    }
  }
}

struct Arrays {
  const Row* rows;       // [count]
  const double* scores;  // [count, 32]
  double* out;           // [2, count, 32], with elements read one by one, and in pairs
  bool* seen;            // [2, count, 32], likewise
  double* sinks;         // [count]
};

template <typename Variant> void evaluate(const Variant& variant, int count, const Arrays& arrays) {
  using Number = typename Variant::Number;
  const auto [rows, scores, out, seen, sinks] = arrays;
  for (int r = 0; r < count; ++r) {
    const Row& row = rows[r];
    const int (&entry)[4] = row.entry;
    typename Variant::Coordinates at = {
        {entry[0], entry[1], entry[2], entry[3]}, row.b, row.h, row.i, row.row, row.key,
        row.len_q, row.len_k, Number(row.scale)};
    sinks[r] = variant.sink(at);
    typename Variant::ScoreReads score_reads[4];
    typename Variant::MaskReads mask_reads[4];
    look_up(score_reads, variant, at, row.key);
    fetch(score_reads, variant, at, row.key);
    look_up(mask_reads, variant, at, row.key);
    for (int n = 0; n < 32; ++n) {
      const int lane = n / 2 % 4, c = n / 8 * 2 + n % 2, step = n - 2 * lane, place = 32 * r + n;
      at.key = row.key + 2 * lane;
      const int other = 32 * count + place;
      const Number score = scores[place];
      out[place] = variant.template score<false>(score, at, step, score_reads[lane], c);
      out[other] = variant.template score<true>(score, at, step, score_reads[lane], c);
      seen[place] = variant.template mask<false>(at, step, mask_reads[lane], c);
      seen[other] = variant.template mask<true>(at, step, mask_reads[lane], c);
    }
  }
}
"""
_VARIANT = """
namespace {name} {{
using Element = {element};
{text}
static_assert(sizeof(Variant) == {size}, "as in Python");
}}
extern "C" void evaluate_{name}(const {name}::Variant& variant, int count, const Arrays& arrays) {{
  evaluate(variant, count, arrays);
}}
"""
_VISIBLE = """
extern "C" int visible_{name}(const {name}::Variant& variant, const interval::Area& area) {{
  interval::Truth dense[{name}::kDense + 1] = {{}};
  const auto never = [](interval::Truth) {{ return false; }};
  for (int n = 0; n < 32 * {name}::kDense; ++n) {{  // lane by lane
    interval::Truth& each = dense[n / 32];
    each = interval::join(each, {name}::dense_part(n / 32, variant, area, n % 32, never));
  }}
  const interval::Truth found = visible(variant, area, dense);
  return found.no + 2 * found.yes;
}}
"""
_INCLUDE = re.compile(r"#include .*")
_STRING = r'"(?:[^"\\]|\\.)*"'
_ASM = re.compile(rf'\basm(?: volatile)?\(((?:{_STRING}|[^;"])*)\);')
_OPERAND = re.compile(r'"(=?)\+?\w"\(((?:[^()]|\([^()]*\))*)\)')


def layout(program: Program, number: str) -> np.dtype:
    """The struct Variant that variants/cuda.py writes."""
    numbers = {"float": number, "int": "i4", "bool": "?"}
    fields: list[Any] = []
    for slot, kind in enumerate(program.slots):
        along = [("strides", "i8", (kind.axes,)), ("lengths", "i4", (kind.axes + kind.axes % 2,))]
        array = np.dtype([("data", "u8"), ("batch", "i8", BATCH_AXES), *along], align=True)
        fields.append((f"p{slot}", array if kind.axes else numbers[kind.type]))
    return np.dtype([*fields, ("entries", "i8", BATCH_AXES), ("first", "i8")], align=True)


def _called(statement: re.Match) -> str:
    """The call that stands for an `asm` statement."""
    instruction = re.match(rf"(?:\s*{_STRING})*", statement[1])[0]
    operands = _OPERAND.findall(statement[1].removeprefix(instruction))
    inputs = [text for mark, text in operands if not mark]
    arguments = ", ".join([*inputs, *(text for mark, text in operands if mark)])
    if loaded := re.search(r"@p ld\.global\.nc(?:\.v\d)?\.[ub](\d+)", instruction):
        return f"ptx::load<{loaded[1]}>({arguments});"
    if '"cvt.f32.f16 %0, %1;"' in instruction:
        return f"ptx::widen({arguments});"
    if '"mul.wide.u32 %0, %1, %2;"' in instruction:
        return f"ptx::multiply({arguments});"
    return "abort();"


def header(path: str) -> str:
    """A header of ours, with all that it includes, for g++."""
    return _CUDA + _ASM.sub(_called, source.text(source.Kernel(path, entry="")))


def text(programs: Sequence[Program]) -> str:
    """One C++ program for all of them, in float32 and in float64."""
    parts = [header("device/interval.cuh"), _DRIVER]
    for name, dtype in (("Row", ROW), ("interval::Area", AREA)):
        parts.append(f'static_assert(sizeof({name}) == {dtype.itemsize}, "as in Python");')
    for index, program in enumerate(programs):
        written = _INCLUDE.sub("", program.text + program.tiles)
        for number, element in TYPES.items():
            form = _VARIANT + (_VISIBLE if program.has_mask else "")
            name, size = f"{number}_{index}", layout(program, number).itemsize
            parts.append(form.format(name=name, element=element, text=written, size=size))
    return "\n".join(parts)


def compiled(code: str, folder: Path) -> ctypes.CDLL:
    """A C++ program, compiled in this folder."""
    (folder / "emulated.cpp").write_text(code)
    flags = ["-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-fmax-errors=3", "-ffp-contract=off"]
    command = ["g++", *flags, "-o", "emulated.so", "emulated.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "emulated.so"))


class Emulated:
    """Programs, compiled; `values` are those of a program's slots, in NumPy."""

    def __init__(self, programs: Sequence[Program], folder: Path) -> None:
        self.programs = programs
        self.library = compiled(text(programs), folder)

    def evaluate(
        self, index: int, number: str, values: Sequence[Any], rows: np.ndarray, scores: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores and masks [2, rows, KEYS], without and with reads in pairs, and sinks [rows]."""
        out, seen = np.empty((2, len(rows), KEYS)), np.empty((2, len(rows), KEYS), bool)
        sinks = np.empty(len(rows))
        assert (rows.dtype, scores.dtype) == (ROW, np.float64)
        assert rows.flags.c_contiguous
        assert scores.flags.c_contiguous
        variant = self.filled(index, number, values)
        arrays = np.array([address(each) for each in (rows, scores, out, seen, sinks)], np.uint64)
        function = self.library[f"evaluate_{number}_{index}"]
        function(pointer(variant), len(rows), pointer(arrays))
        return out, seen, sinks

    def visible(
        self, index: int, number: str, values: Sequence[Any], area: np.ndarray
    ) -> tuple[bool, bool]:
        """Whether an area may have a hidden place, and whether it may have one that is seen."""
        assert area.dtype == AREA
        variant = self.filled(index, number, values)
        found = self.library[f"visible_{number}_{index}"](pointer(variant), pointer(area))
        return bool(found & 1), bool(found & 2)

    def reads(self) -> int:
        """How many elements have been read one by one, by all so far."""
        return ctypes.c_long.in_dll(self.library, "reads").value

    def filled(self, index: int, number: str, values: Sequence[Any]) -> np.ndarray:
        """The struct Variant with its values."""
        program = self.programs[index]
        filled = np.zeros((), layout(program, number))
        for slot, (kind, value) in enumerate(zip(program.slots, values, strict=True)):
            name = f"p{slot}"
            if not kind.axes:
                filled[name] = value
                continue
            steps = [stride // value.itemsize for stride in value.strides]
            walked = steps[: -kind.axes]
            filled[name]["data"] = address(value)
            filled[name]["batch"] = [0] * (BATCH_AXES - len(walked)) + walked
            filled[name]["strides"] = steps[-kind.axes :]
            filled[name]["lengths"][: kind.axes] = value.shape[-kind.axes :]
        return filled


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(address(array))

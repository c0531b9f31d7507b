// Where the value of an expression lies when its coordinates run over ranges: what is never true in a tile, and what always.
//
// Bounds are kept in float64, wide enough for the rounding of the numbers that they stand for. What cannot be bounded is anything.
#include "device/expression.cuh"

namespace interval {

struct Range {
  double low, high;
  bool nan;  // it may be NaN
};
struct Truth {
  bool no, yes;  // it may be false, it may be true
};

constexpr double kSmallest = -2147483648.0, kLargestInt = 2147483647.0;  // of 32 bits
constexpr int kMostElements = 512;     // of an array that one lane looks at
constexpr int kMostOfAWarp = 1 << 16;  // that a warp does

__device__ __forceinline__ Range between(double low, double high) { return {low, high, false}; }
__device__ __forceinline__ Range anything() { return {-infinity<double>(), infinity<double>(), true}; }
__device__ __forceinline__ Range exactly(double x) { return x == x ? between(x, x) : anything(); }
__device__ __forceinline__ Truth known(bool x) { return {!x, x}; }
__device__ __forceinline__ bool finite(Range a) { return a.low > -infinity<double>() && a.high < infinity<double>() && !a.nan; }
__device__ __forceinline__ bool has_zero(Range a) { return a.low <= 0 && a.high >= 0; }
__device__ __forceinline__ double least(double a, double b) { return a < b ? a : b; }
__device__ __forceinline__ double most(double a, double b) { return a > b ? a : b; }
__device__ __forceinline__ Range hull(double a, double b, double c, double d) {
  return between(least(least(a, b), least(c, d)), most(most(a, b), most(c, d)));
}

// An integer that may have wrapped is any; a number may lie beside its exact value, by float32's rounding or that of a coarse function, or
// may have overflowed.
template <bool kInt> __device__ __forceinline__ Range rounded(Range a, double error = 1e-6) {
  if (kInt) return a.low >= kSmallest && a.high <= kLargestInt ? a : between(kSmallest, kLargestInt);
  if (!finite(a) || a.low < -1e38 || a.high > 1e38) return anything();
  return {a.low - fabs(a.low) * error - 1e-30, a.high + fabs(a.high) * error + 1e-30, a.nan};
}
template <bool kInt> __device__ __forceinline__ Range unbounded() { return kInt ? between(kSmallest, kLargestInt) : anything(); }

template <bool kInt> __device__ __forceinline__ Range add(Range a, Range b) {
  if (!finite(a) || !finite(b)) return unbounded<kInt>();
  return rounded<kInt>(between(a.low + b.low, a.high + b.high));
}
template <bool kInt> __device__ __forceinline__ Range negate(Range a) { return rounded<kInt>({-a.high, -a.low, a.nan}, 0); }
template <bool kInt> __device__ __forceinline__ Range subtract(Range a, Range b) {
  if (!finite(a) || !finite(b)) return unbounded<kInt>();
  return rounded<kInt>(between(a.low - b.high, a.high - b.low));
}
template <bool kInt> __device__ __forceinline__ Range multiply(Range a, Range b) {
  if (!finite(a) || !finite(b)) return unbounded<kInt>();
  return rounded<kInt>(hull(a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high));
}
template <bool kInt> __device__ __forceinline__ Range divide(Range a, Range b) {
  if (!finite(a) || !finite(b) || has_zero(b)) return unbounded<kInt>();
  return rounded<kInt>(hull(a.low / b.low, a.low / b.high, a.high / b.low, a.high / b.high));
}
template <bool kInt> __device__ __forceinline__ Range floor_divide(Range a, Range b) {
  if (!finite(a) || !finite(b) || has_zero(b)) return unbounded<kInt>();
  const Range exact = hull(a.low / b.low, a.low / b.high, a.high / b.low, a.high / b.high);
  return rounded<kInt>(between(floor(exact.low) - !kInt, floor(exact.high) + !kInt));
}
template <bool kInt> __device__ __forceinline__ Range remainder(Range a, Range b) {
  if (!kInt || b.low != b.high || b.low <= 0) return unbounded<kInt>();
  const double first = floor(a.low / b.low);
  return first == floor(a.high / b.low) ? between(a.low - first * b.low, a.high - first * b.low) : between(0, b.low - 1);
}
template <bool kInt> __device__ __forceinline__ Range abs(Range a) {
  const double low = fabs(a.low), high = fabs(a.high);
  return rounded<kInt>({has_zero(a) ? 0 : least(low, high), most(low, high), a.nan}, 0);
}
template <bool kInt> __device__ __forceinline__ Range minimum(Range a, Range b) {
  return {least(a.low, b.low), least(a.high, b.high), a.nan || b.nan};
}
template <bool kInt> __device__ __forceinline__ Range maximum(Range a, Range b) {
  return {most(a.low, b.low), most(a.high, b.high), a.nan || b.nan};
}

constexpr double kCoarse = 2e-3;  // the error of the hardware's own functions, rather more
__device__ __forceinline__ Range exp(Range a) {
  return finite(a) && a.high < 80 ? rounded<false>(between(::exp(a.low), ::exp(a.high)), kCoarse) : anything();
}
__device__ __forceinline__ Range log(Range a) {
  if (!finite(a) || a.low <= 1e-30) return anything();
  const double low = ::log(a.low), high = ::log(a.high);
  return between(low - fabs(low) * kCoarse - kCoarse, high + fabs(high) * kCoarse + kCoarse);
}
__device__ __forceinline__ Range tanh(Range a) {
  return rounded<false>({::tanh(a.low), ::tanh(a.high), a.nan}, kCoarse);
}
__device__ __forceinline__ Range sqrt(Range a) {
  return finite(a) && a.low >= 0 ? rounded<false>(between(::sqrt(a.low), ::sqrt(a.high)), kCoarse) : anything();
}

__device__ __forceinline__ Truth less(Range a, Range b) { return {a.nan || b.nan || a.high >= b.low, a.low < b.high}; }
__device__ __forceinline__ Truth less_equal(Range a, Range b) { return {a.nan || b.nan || a.high > b.low, a.low <= b.high}; }
__device__ __forceinline__ Truth greater(Range a, Range b) { return less(b, a); }
__device__ __forceinline__ Truth greater_equal(Range a, Range b) { return less_equal(b, a); }
__device__ __forceinline__ Truth equal(Range a, Range b) {
  const bool one = a.low == a.high && b.low == b.high && a.low == b.low && !a.nan && !b.nan;
  return {!one, a.low <= b.high && b.low <= a.high};
}
__device__ __forceinline__ Truth equal(Truth a, Truth b) {
  return {(a.yes && b.no) || (a.no && b.yes), (a.yes && b.yes) || (a.no && b.no)};
}
__device__ __forceinline__ Truth negation(Truth a) { return {a.yes, a.no}; }
template <typename T> __device__ __forceinline__ Truth different(T a, T b) { return negation(equal(a, b)); }

// What follows the first operand is a function, which is not called where the first decides.
template <typename Later> __device__ __forceinline__ Truth both(Truth a, Later later) {
  if (!a.yes) return a;
  const Truth b = later();
  return {a.no || b.no, b.yes};
}
template <typename Later> __device__ __forceinline__ Truth either(Truth a, Later later) {
  if (!a.no) return a;
  const Truth b = later();
  return {b.no, a.yes || b.yes};
}
__device__ __forceinline__ Range join(Range a, Range b) { return {least(a.low, b.low), most(a.high, b.high), a.nan || b.nan}; }
__device__ __forceinline__ Truth join(Truth a, Truth b) { return {a.no || b.no, a.yes || b.yes}; }
template <typename A, typename B> __device__ __forceinline__ auto where(Truth condition, A a, B b) {
  if (!condition.no) return a();
  if (!condition.yes) return b();
  return join(a(), b());
}

__device__ __forceinline__ Truth of_value(bool x) { return known(x); }
template <typename T> __device__ __forceinline__ Range of_value(T x) { return exactly(double(x)); }
__device__ __forceinline__ Truth of_any(bool) { return {true, true}; }
__device__ __forceinline__ Range of_any(int) { return between(kSmallest, kLargestInt); }
template <typename T> __device__ __forceinline__ Range of_any(T) { return anything(); }

// The elements of an array at some indices, each of them once.
template <int kAxes> struct Box {
  int first[kAxes], count[kAxes];
  double all = 1;

  template <typename Array, typename... Index> __device__ __forceinline__ explicit Box(const Array& array, Index... indices) {
    const Range at[kAxes] = {indices...};
    for (int axis = 0; axis < kAxes; ++axis) {
      const double last = array.lengths[axis] - 1;
      first[axis] = int(least(most(at[axis].low, 0), last));
      count[axis] = array.strides[axis] == 0 ? 1 : int(least(most(at[axis].high, 0), last)) - first[axis] + 1;
      all *= count[axis];
    }
  }
};

// What the elements at some indices are, if they are not too many.
template <typename Number, typename T, int kAxes, bool kUnit, typename... Index>
__device__ __forceinline__ auto element(const expression::Array<T, kAxes, kUnit>& array, const int (&entry)[expression::kBatchAxes],
                                        Index... indices) {
  using Value = expression::Value<Number>;
  const Box<kAxes> box(array, indices...);
  if (box.all > kMostElements) return of_any(Value::of(T()));
  const T* first = array.begin(entry);
  for (int axis = 0; axis < kAxes; ++axis) first += box.first[axis] * array.stride(axis);
  auto found = of_value(Value::of(expression::constant(first)));
  for (int number = 1; number < int(box.all); ++number) {  // often there is but one, and nothing to divide
    int64 place = 0;
    int rest = number;
    for (int axis = kAxes - 1; axis >= 0; --axis) {
      place += rest % box.count[axis] * array.stride(axis);
      rest /= box.count[axis];
    }
    found = join(found, of_value(Value::of(expression::constant(first + place))));
  }
  return found;
}

__device__ __forceinline__ Truth narrowed(Truth a, Truth b) { return {a.no && b.no, a.yes && b.yes}; }  // both are right

template <int kWidth> __device__ __forceinline__ uint64 word_if(bool exists, const bool* from) {
  if constexpr (kWidth == 8) {
    uint64 word;
    expression::load_if(exists, from, word);
    return word;
  } else {
    unsigned char byte;
    expression::load_if(exists, from, byte);
    return byte;
  }
}

// The same of truth values that lie along keys, for the lanes of a warp together: what this lane found in its part. A word has kWidth
// elements. `enough(found)` says whether to stop, and is asked by all lanes as often.
template <int kWidth, int kAxes, typename Enough, typename... Index>
__device__ __forceinline__ Truth part_of_elements(const expression::Array<bool, kAxes, true>& array, const int (&entry)[expression::kBatchAxes],
                                                  int lane, Enough enough, Index... indices) {
  static_assert(kAxes >= 2 && (kWidth == 1 || kWidth == 8), "rows of bytes, or of words that are aligned");
  constexpr int kAtOnce = 4;  // words under way
  constexpr int kRow = kAxes - 2, kKey = kAxes - 1;
  const Box<kAxes> box(array, indices...);
  if (box.all > kMostOfAWarp) return {true, true};
  const int end = box.first[kKey] + box.count[kKey], first_word = box.first[kKey] / kWidth, words = (end - 1) / kWidth + 1 - first_word;
  int side_by_side = 1;  // lanes along a row
  while (side_by_side < words && side_by_side < 32) side_by_side *= 2;
  const int step = 32 / side_by_side, rows = box.count[kRow], matrices = int(box.all) / (rows * box.count[kKey]);

  Truth found = {false, false};
  for (int matrix = 0; matrix < matrices; ++matrix) {
    const bool* rows_of = array.begin(entry) + box.first[kRow] * array.stride(kRow);
    for (int axis = kRow - 1, rest = matrix; axis >= 0; rest /= box.count[axis--]) {
      rows_of += (box.first[axis] + rest % box.count[axis]) * array.stride(axis);
    }
    for (int word = lane % side_by_side; word - lane % side_by_side < words; word += side_by_side) {
      const int key = (first_word + word) * kWidth;
      uint64 inside = word < words ? ~0ull >> (64 - 8 * kWidth) : 0;  // the bytes of elements that are asked about
      if (key < box.first[kKey]) inside &= ~0ull << 8 * (box.first[kKey] - key);
      if (key + kWidth > end && key < end) inside &= ~0ull >> 8 * (8 - (end - key));
      for (int top = 0; top < rows; top += kAtOnce * step) {
        uint64 bytes[kAtOnce];
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          const int row = top + n * step + lane / side_by_side;
          bytes[n] = word_if<kWidth>(word < words && row < rows, rows_of + row * array.stride(kRow) + key);
        }
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          const uint64 there = top + n * step + lane / side_by_side < rows ? inside : 0, set = bytes[n] | ~there;
          found.yes |= (bytes[n] & there) != 0;
          found.no |= ((set - 0x0101010101010101ull) & ~set & 0x8080808080808080ull) != 0;  // some byte is 0
        }
        if (enough(found)) return found;
      }
    }
  }
  return found;
}

// The coordinates of a tile.
struct Area {
  int entry[expression::kBatchAxes];
  Range b, h, i, row, j, len_q, len_k;
};

}  // namespace interval

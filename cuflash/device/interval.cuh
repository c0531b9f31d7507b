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
constexpr int kMostElements = 512;  // of an array that are looked at

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

// What the elements at some indices are, if they are not too many.
template <typename Number, typename T, int kAxes, bool kUnit, typename... Index>
__device__ __forceinline__ auto element(const expression::Array<T, kAxes, kUnit>& array, const int (&entry)[expression::kBatchAxes],
                                        Index... indices) {
  using Value = expression::Value<Number>;
  const Range at[kAxes] = {indices...};
  int first[kAxes], count[kAxes];
  double all = 1;
  for (int axis = 0; axis < kAxes; ++axis) {
    const double last = array.lengths[axis] - 1;
    first[axis] = int(least(most(at[axis].low, 0), last));
    count[axis] = int(least(most(at[axis].high, 0), last)) - first[axis] + 1;
    all *= array.strides[axis] == 0 ? 1 : count[axis];
    if (array.strides[axis] == 0) count[axis] = 1;
  }
  const T* data = array.begin(entry);
  if (all > kMostElements) return of_any(Value::of(T()));
  decltype(of_value(Value::of(*data))) found = {};
  for (int number = 0; number < int(all); ++number) {
    int64 place = 0;
    int rest = number;
    for (int axis = kAxes - 1; axis >= 0; --axis) {
      place += (first[axis] + rest % count[axis]) * array.stride(axis);
      rest /= count[axis];
    }
    const auto value = of_value(Value::of(expression::constant(data + place)));
    found = number == 0 ? value : join(found, value);
  }
  return found;
}

// The coordinates of a tile.
struct Area {
  int entry[expression::kBatchAxes];
  Range b, h, i, row, j, len_q, len_k;
};

}  // namespace interval

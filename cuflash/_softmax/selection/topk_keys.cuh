// The order of a row's elements: by value, NaN the largest and -0 equal to 0, and then by column, the lowest first.
#include "device/types.cuh"

using Score = Accumulator<Element>;

template <typename Score> struct OrderOf { using type = uint32; };
template <> struct OrderOf<double> { using type = uint64; };
using Order = OrderOf<Score>::type;

// An unsigned integer that grows with x, at least 1. No arithmetic touches x, which would flush subnormal values to 0.
__device__ __forceinline__ uint32 order(float x) {
  const uint32 sign = 0x80000000, bits = __float_as_uint(x), magnitude = bits & ~sign;
  if (magnitude > 0x7f800000) return ~0u;
  if (magnitude == 0) return sign;
  return bits & sign ? ~bits : bits | sign;
}
__device__ __forceinline__ uint64 order(double x) {
  const uint64 sign = 1ull << 63, bits = uint64(__double_as_longlong(x)), magnitude = bits & ~sign;
  if (magnitude > 0x7ffull << 52) return ~0ull;
  if (magnitude == 0) return sign;
  return bits & sign ? ~bits : bits | sign;
}

// Its inverse, NaN for what no number is ordered as.
__device__ __forceinline__ float score_of(uint32 order) {
  const uint32 sign = 0x80000000;
  return __uint_as_float(order & sign ? order ^ sign : ~order);
}
__device__ __forceinline__ double score_of(uint64 order) {
  const uint64 sign = 1ull << 63;
  return __longlong_as_double(int64(order & sign ? order ^ sign : ~order));
}

// Bit for bit: a comparison of subnormal values flushes them to 0.
__device__ __forceinline__ bool same(float a, float b) { return __float_as_uint(a) == __float_as_uint(b); }
__device__ __forceinline__ bool same(double a, double b) { return __double_as_longlong(a) == __double_as_longlong(b); }

// The larger, NaN above all. PTX ISA, "Floating Point Instructions: max".
__device__ __forceinline__ float larger(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#else
  return order(a) > order(b) ? a : b;
#endif
}
__device__ __forceinline__ double larger(double a, double b) { return b <= a || a != a ? a : b; }

// An element's place in the order: no two elements of a row have the same.
struct alignas(2 * sizeof(Order)) Key {
  Order value;
  uint32 rank;  // the column's complement; 0 for no element

  // Whether the element comes before that of another key, or is the same. Without branches, as && has them.
  __device__ __forceinline__ bool reaches(Key other) const {
    if constexpr (sizeof(Order) == 4) return word() >= other.word();
    return value > other.value | (value == other.value & rank >= other.rank);
  }
  __device__ __forceinline__ Key of_lane(int lane) const {
    return {__shfl_sync(0xffffffff, value, lane), __shfl_sync(0xffffffff, rank, lane)};
  }
  __device__ __forceinline__ uint64 word() const { return uint64(value) << 32 | rank; }
};

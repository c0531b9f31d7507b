// Element types under NumPy's names, their accumulators, and the conversions between them. No CUDA header is needed.
using int64 = long long;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;

struct float16 { uint16 bits; };
struct bfloat16 { uint16 bits; };
using float32 = float;
using float64 = double;

// Scores and sums accumulate in float32, or in float64 for float64 input.
template <typename Element> struct AccumulatorOf { using type = float; };
template <> struct AccumulatorOf<double> { using type = double; };
template <typename Element> using Accumulator = typename AccumulatorOf<Element>::type;

__device__ __forceinline__ float widen(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ float widen(bfloat16 x) { return __uint_as_float(uint32(x.bits) << 16); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

// Rounds to the nearest value, ties to even.
template <typename Element> __device__ __forceinline__ Element narrow(Accumulator<Element> x) {
  return x;
}
template <> __device__ __forceinline__ float16 narrow<float16>(float x) {
  float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <> __device__ __forceinline__ bfloat16 narrow<bfloat16>(float x) {
  bfloat16 y;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const uint32 bits = __float_as_uint(x);
  const bool is_nan = x != x;
  y.bits = is_nan ? 0x7fff : uint16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
  return y;
}

// Two neighbours in one register, the first in the low half, as the tensor cores want them.
template <typename Element> __device__ __forceinline__ uint32 narrow_pair(float first, float second);
template <> __device__ __forceinline__ uint32 narrow_pair<float16>(float first, float second) {
  uint32 pair;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
#else
  pair = narrow<float16>(first).bits | uint32(narrow<float16>(second).bits) << 16;
#endif
  return pair;
}
template <> __device__ __forceinline__ uint32 narrow_pair<bfloat16>(float first, float second) {
  uint32 pair;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
#else
  pair = narrow<bfloat16>(first).bits | uint32(narrow<bfloat16>(second).bits) << 16;
#endif
  return pair;
}

// And back.
template <typename Element> __device__ __forceinline__ void widen_pair(uint32 pair, float& first, float& second);
template <> __device__ __forceinline__ void widen_pair<float16>(uint32 pair, float& first, float& second) {
  asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %2;\n\tcvt.f32.f16 %0, low;\n\tcvt.f32.f16 %1, high;\n\t}"
      : "=f"(first), "=f"(second)
      : "r"(pair));
}
template <> __device__ __forceinline__ void widen_pair<bfloat16>(uint32 pair, float& first, float& second) {
  first = __uint_as_float(pair << 16);
  second = __uint_as_float(pair & 0xffff0000u);
}

// N elements that are read and written as one word.
template <typename Element, int N> struct alignas(N * sizeof(Element)) Vector { Element at[N]; };

template <typename T> __device__ __forceinline__ T infinity();
template <> __device__ __forceinline__ float infinity<float>() { return __int_as_float(0x7f800000); }
template <> __device__ __forceinline__ double infinity<double>() {
  return __longlong_as_double(0x7ff0000000000000ll);
}
// The largest finite number.
template <typename T> constexpr T kLargest = T(3.4028234663852886e38);
template <> constexpr double kLargest<double> = 1.7976931348623157e308;
template <typename T> __device__ __forceinline__ T nan() { return infinity<T>() - infinity<T>(); }

template <typename T> __device__ __forceinline__ T min_of(T a, T b) { return a < b ? a : b; }
template <typename T> __device__ __forceinline__ T max_of(T a, T b) { return a > b ? a : b; }
template <> __device__ __forceinline__ float max_of(float a, float b) { return fmaxf(a, b); }  // one instruction

// Hides where a value comes from: what is computed from it is then not computed ahead of a loop and kept in registers through it.
__device__ __forceinline__ int recomputed(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The condition, and that the compiler should put what depends on it out of the way.
__device__ __forceinline__ bool seldom(bool condition) { return __builtin_expect(condition, false); }

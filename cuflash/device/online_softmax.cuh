// The running pair (m, d) of a softmax: m a maximum, d = sum of exp(x - m).
//
// Milakov and Gimelshein, "Online normalizer calculation for softmax", Algorithm 3 and equation 4; FlashAttention carries the
// weighted sum o beside the pair and rescales it by the same factor. Pairs form a commutative monoid under `merge` with
// `empty` as identity, so that any tiling, any tree and any order of blocks gives the same softmax.
//
// Pairs count in base 2 unless told otherwise: callers fold log2(e) into their scale, because ex2 is one instruction. A softmax of
// the caller's own scores has no scale to fold it into (rounding x * log2(e) at x = 1000 costs exp(x - m) ten bits): base e.
#include "device/exp_double.cuh"
#include "device/types.cuh"

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

__device__ __forceinline__ float exp_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double exp_2(double x) { return exp2(x); }

// 1 / x to one unit in the last place, for x from 2^-126 to 2^126.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log_2(float x) { return log2f(x); }
__device__ __forceinline__ double log_2(double x) { return log2(x); }

// The maximum to subtract. A row that has seen only -inf keeps 0 instead: exp2(-inf - 0) is the wanted 0, exp2(-inf + inf) NaN.
template <typename T> __device__ __forceinline__ T finite_reference(T max) {
  return max == -infinity<T>() ? T(0) : max;
}

struct Base2 {
  template <typename T> static __device__ __forceinline__ T exp(T x) { return exp_2(x); }
  template <typename T> static __device__ __forceinline__ T log(T x) { return log_2(x); }
  template <typename T> static __device__ __forceinline__ T reference(T max) { return finite_reference(max); }
};

struct BaseE {
  static __device__ __forceinline__ float exp(float x) { return expf(x); }
  static __device__ __forceinline__ double exp(double x) { return ::exp(x); }
  // For terms of a sum of at least 1, x <= 0, or inf. The error of floats grows with |x|, which there shrinks the term faster.
  static __device__ __forceinline__ float exp_in_sum(float x) { return exp_2(x * float(kLog2E)); }
  static __device__ __forceinline__ double exp_in_sum(double x) { return exp_of_term(x); }
  static __device__ __forceinline__ float log(float x) { return logf(x); }
  static __device__ __forceinline__ double log(double x) { return ::log(x); }

  // 0 for +inf as well: such a row ends as (inf, inf), which tells it from one with a NaN.
  template <typename T> static __device__ __forceinline__ T reference(T max) {
    return max == infinity<T>() ? T(0) : finite_reference(max);
  }
};

template <typename T, typename Base = Base2> struct RunningPair {
  T max;  // m; -inf for the empty pair
  T sum;  // d, relative to 2^m (or e^m)

  static __device__ __forceinline__ RunningPair empty() { return {-infinity<T>(), T(0)}; }

  // Raises the maximum to at least `score` and returns the factor by which d (and o) shrank: 2^(m_old - m_new).
  __device__ __forceinline__ T raise(T score) {
    const T raised = score > max ? score : max;  // a NaN score leaves m; it enters d through its own exponential
    const T factor = Base::exp(max - Base::reference(raised));
    max = raised;
    sum *= factor;
    return factor;
  }

  // One more score (Algorithm 3, lines 4 and 5).
  __device__ __forceinline__ void update(T score) {
    raise(score);
    sum += Base::exp(score - Base::reference(max));
  }

  // The monoid's operation (equation 4).
  __device__ __forceinline__ void merge(RunningPair other) {
    raise(other.max);
    sum += other.sum * Base::exp(other.max - Base::reference(max));
  }

  // log2 of the sum of 2^x (log of the sum of e^x); -inf for the empty pair.
  __device__ __forceinline__ T log_sum() const { return max + Base::log(sum); }
};

// What a row is boiled down to: one state for each operation, all of them commutative monoids (`empty`, `merge`).
#include "_softmax/layout.cuh"
#include "device/online_softmax.cuh"

// softmax and log_softmax: the running pair, in base e because the scores are the caller's own.
using Pair = RunningPair<Score, BaseE>;

// logsumexp: the running pair with d in two parts, `top` from elements equal to m and `rest`. One sum would lose 1e-20
// beside the 1 of the largest element, though log(1 + 1e-20) is 1e-20.
struct LogSum {
  Score max, top, rest;

  static __device__ __forceinline__ LogSum empty() { return {-infinity<Score>(), Score(0), Score(0)}; }

  __device__ __forceinline__ void raise(Score score) {
    if (score > max) {  // not so for NaN, which reaches rest through its own exponential
      rest = (top + rest) * BaseE::exp(max - score);
      top = Score(0);
      max = score;
    }
  }

  // Elements that equal the maximum: the exponential of each is 1, but inf for inf and 0 for -inf, and never inf - inf.
  __device__ __forceinline__ void add_top(Score weight) {
    if (weight != 0) top += weight * BaseE::exp(max - BaseE::reference(max));
  }

  __device__ __forceinline__ void merge(LogSum other) {
    if (other.max > max) {
      const LogSum mine = *this;
      *this = other;
      other = mine;
    }
    const bool level = other.max == max;
    top += level ? other.top : Score(0);
    rest += level ? other.rest : (other.top + other.rest) * BaseE::exp(other.max - max);
  }

  // log|sum|. With rest near -top the total is exact and log1p is not; with rest small it is the reverse.
  __device__ __forceinline__ Score log_abs() const {
    if (abs(rest) < abs(top) / 2) return max + (BaseE::log(abs(top)) + log1p(rest / top));
    return max + BaseE::log(abs(top + rest));
  }

  __device__ __forceinline__ Score sign() const {
    const Score total = top + rest;
    return total > 0 ? Score(1) : total < 0 ? Score(-1) : total;  // 0 or NaN
  }
};

// Cross-entropy: the logits' logsumexp, and for label smoothing their plain sum.
struct LogSumAndSum {
  LogSum log;
  Score sum;

  static __device__ __forceinline__ LogSumAndSum empty() { return {LogSum::empty(), Score(0)}; }
  __device__ __forceinline__ void merge(LogSumAndSum other) {
    log.merge(other.log);
    sum += other.sum;
  }
};

// The backward passes: a plain sum.
struct Sum {
  Score sum;

  static __device__ __forceinline__ Sum empty() { return {Score(0)}; }
  __device__ __forceinline__ void merge(Sum other) { sum += other.sum; }
};

// The state of the lane whose number differs in the bits of `mask`.
__device__ __forceinline__ Score exchange(Score value, int mask) { return __shfl_xor_sync(0xffffffff, value, mask); }
__device__ __forceinline__ Pair exchange(Pair state, int mask) {
  return {exchange(state.max, mask), exchange(state.sum, mask)};
}
__device__ __forceinline__ LogSum exchange(LogSum state, int mask) {
  return {exchange(state.max, mask), exchange(state.top, mask), exchange(state.rest, mask)};
}
__device__ __forceinline__ LogSumAndSum exchange(LogSumAndSum state, int mask) {
  return {exchange(state.log, mask), exchange(state.sum, mask)};
}
__device__ __forceinline__ Sum exchange(Sum state, int mask) { return {exchange(state.sum, mask)}; }

template <int N> __device__ __forceinline__ Score largest(const Score (&scores)[N]) {
  Score max = scores[0];
#pragma unroll
  for (int i = 1; i < N; ++i) max = max_of(max, scores[i]);
  return max;
}

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

// What joining the lanes of a warp needs of a state: its maximum, and to add up sums once all have the same maximum.
__device__ __forceinline__ Score exchange(Score value, int mask) { return __shfl_xor_sync(0xffffffff, value, mask); }

__device__ __forceinline__ Score maximum(Pair state) { return state.max; }
__device__ __forceinline__ Score maximum(LogSum state) { return state.max; }
__device__ __forceinline__ Score maximum(LogSumAndSum state) { return state.log.max; }
__device__ __forceinline__ Score maximum(Sum) { return 0; }

__device__ __forceinline__ void raise(Pair& state, Score max) { state.raise(max); }
__device__ __forceinline__ void raise(LogSum& state, Score max) { state.raise(max); }
__device__ __forceinline__ void raise(LogSumAndSum& state, Score max) { state.log.raise(max); }
__device__ __forceinline__ void raise(Sum&, Score) {}

__device__ __forceinline__ void add_lane(Pair& state, int mask) { state.sum += exchange(state.sum, mask); }
__device__ __forceinline__ void add_lane(LogSum& state, int mask) {
  state.top += exchange(state.top, mask);
  state.rest += exchange(state.rest, mask);
}
__device__ __forceinline__ void add_lane(LogSumAndSum& state, int mask) {
  add_lane(state.log, mask);
  state.sum += exchange(state.sum, mask);
}
__device__ __forceinline__ void add_lane(Sum& state, int mask) { state.sum += exchange(state.sum, mask); }

// Joins the states of the lanes whose numbers differ in bits from kFirst to below kEnd; all of them get the same. One common
// maximum first, so that each state is rescaled once and not at every step.
template <int kFirst, int kEnd, typename State> __device__ __forceinline__ State merge_lanes(State state) {
  Score max = maximum(state);
#pragma unroll
  for (int mask = kFirst; mask < kEnd; mask *= 2) max = max_of(max, exchange(max, mask));
  raise(state, max);
#pragma unroll
  for (int mask = kFirst; mask < kEnd; mask *= 2) add_lane(state, mask);
  return state;
}

template <int N> __device__ __forceinline__ Score largest(const Score (&scores)[N]) {
  Score max = scores[0];
#pragma unroll
  for (int i = 1; i < N; ++i) max = max_of(max, scores[i]);
  return max;
}

// What a row is boiled down to, and how threads join their parts of it.
#include "_softmax/layout.cuh"
#include "device/online_softmax.cuh"

// softmax and log_softmax: the running pair, in base e because the scores are the caller's own.
using Pair = RunningPair<Score, BaseE>;

// logsumexp: the running pair with d in two parts, `top` from elements equal to m and `rest`, and with a weight w for each
// element. One sum would lose 1e-20 beside the 1 of the largest element, though log(1 + 1e-20) is 1e-20.
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

  // One more element, once max is at least its score.
  __device__ __forceinline__ void add(Score score, Score weight) {
    const bool at_top = score == max;
    // The exponential of the maximum itself is 1, but inf for inf and 0 for -inf: never inf - inf.
    const Score term = weight * BaseE::exp(score - (at_top ? BaseE::reference(max) : max));
    top += at_top ? term : Score(0);
    rest += at_top ? Score(0) : term;
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

__device__ __forceinline__ Score exchange(Score value, int mask) { return __shfl_xor_sync(0xffffffff, value, mask); }
__device__ __forceinline__ Pair exchange(Pair state, int mask) {
  return {exchange(state.max, mask), exchange(state.sum, mask)};
}
__device__ __forceinline__ LogSum exchange(LogSum state, int mask) {
  return {exchange(state.max, mask), exchange(state.top, mask), exchange(state.rest, mask)};
}

template <int N> __device__ __forceinline__ Score largest(const Score (&scores)[N]) {
  Score max = scores[0];
#pragma unroll
  for (int i = 1; i < N; ++i) max = max_of(max, scores[i]);
  return max;
}

// Takes a tile into the pair (Algorithm 3, lines 4 and 5, a tile at a time). Columns that are not there are -inf.
template <int N> __device__ __forceinline__ void take(Pair& pair, const Score (&scores)[N]) {
  pair.raise(largest(scores));
#pragma unroll
  for (int i = 0; i < N; ++i) pair.sum += BaseE::exp(scores[i] - BaseE::reference(pair.max));
}

// The same, and leaves in `scores` what `Finish::answer_held` wants: for softmax the exponentials, so that none is computed twice.
template <int N> __device__ __forceinline__ void take_held(Pair& pair, Score (&scores)[N]) {
  pair.raise(largest(scores));
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const Score term = BaseE::exp(scores[i] - BaseE::reference(pair.max));
    pair.sum += term;
    if (!kLog) scores[i] = term;
  }
}

template <int N> __device__ __forceinline__ void take(LogSum& sum, Score (&scores)[N], const Score (&weights)[N]) {
  if (kWeighted) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (weights[i] == 0) scores[i] = -infinity<Score>();  // gone, whatever it was: 0 * NaN is NaN
    }
  }
  sum.raise(largest(scores));
#pragma unroll
  for (int i = 0; i < N; ++i) sum.add(scores[i], kWeighted ? weights[i] : Score(1));
}

// Lines 7 to 9 of Algorithm 3: from the pair of a whole row to its answers.
struct Finish {
  Score shift, log_sum, inverse;

  explicit __device__ __forceinline__ Finish(Pair row) {
    shift = BaseE::reference(row.max);
    log_sum = BaseE::log(row.sum);
    // A row with +inf has inf / inf in it: NaN throughout, as in SciPy.
    const Score infinite = infinity<Score>();
    inverse = row.max == infinite ? infinite - infinite : 1 / row.sum;
  }

  template <int N> __device__ __forceinline__ void answer(Score (&scores)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Score shifted = scores[i] - shift;
      scores[i] = kLog ? shifted - log_sum : BaseE::exp(shifted) * inverse;
    }
  }

  // After `take_held` into `own`, from which the row's pair was merged.
  template <int N> __device__ __forceinline__ void answer_held(Pair own, Score (&scores)[N]) const {
    if (kLog) return answer(scores);
    const Score factor = BaseE::exp(own.max - shift) * inverse;
#pragma unroll
    for (int i = 0; i < N; ++i) scores[i] *= factor;
  }
};

// logsumexp's answer for a row.
__device__ __forceinline__ void write_sum(const Params& params, int64 row, LogSum sum) {
  const Score sign = sum.sign();
  const Score infinite = infinity<Score>();
  const Score value = !kSigned && sign < 0 ? infinite - infinite : sum.log_abs();
  params.out[offset<kOuterAxes>(Index(row), params.outer, params.out_strides.outer)] = narrow<Result>(value);
  if (kSigned) {
    params.sign[offset<kOuterAxes>(Index(row), params.outer, params.sign_strides.outer)] = narrow<Result>(sign);
  }
}

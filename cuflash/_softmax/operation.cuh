// What each public function makes of a row. An operation has
//
//   State                  what a row is boiled down to
//   absent()               what stands for elements that a tile has and the row does not
//   take(state, x, beside, present)
//                          takes a tile of elements in (Algorithm 3, lines 4 and 5, a tile at a time); bit i of `present`
//                          tells whether the row has element i
//   take_held(...)         the same, and leaves in `x` what `answer_held` wants, so that nothing is computed twice
//   Answers(row's state)   turns elements into answers (lines 7 to 9): answer, answer_held; not of those that reduce
//   write(params, row, state)  writes the one answer of a row; of those that reduce (kReduces)
//
// `beside` are the elements of the second operand, with kBeside: logsumexp's weights, y of the backward passes.
#include "_softmax/state.cuh"

// The exponential of what is stored as an answer. Of floats the quicker one is not exact enough, but for halves it is.
__device__ __forceinline__ Score answer_exp(Score x) {
  return sizeof(Result) == 4 ? BaseE::exp(x) : BaseE::exp_in_sum(x);
}

struct Softmax {
  using State = Pair;
  static __device__ __forceinline__ Score absent() { return -infinity<Score>(); }

  template <int N> static __device__ __forceinline__ void take(State& pair, const Score (&x)[N], const Score (&)[N], uint32) {
    pair.raise(largest(x));
    const Score shift = BaseE::reference(pair.max);
#pragma unroll
    for (int i = 0; i < N; ++i) pair.sum += BaseE::exp_in_sum(x[i] - shift);
  }

  template <int N> static __device__ __forceinline__ void take_held(State& pair, Score (&x)[N], const Score (&)[N], uint32) {
    pair.raise(largest(x));
    const Score shift = BaseE::reference(pair.max);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = answer_exp(x[i] - shift);
      pair.sum += x[i];
    }
  }

  struct Answers {
    Score shift, inverse;

    explicit __device__ __forceinline__ Answers(State row) {
      shift = BaseE::reference(row.max);
      // A row with +inf has inf / inf in it: NaN throughout, as in SciPy.
      const Score infinite = infinity<Score>();
      inverse = row.max == infinite ? infinite - infinite : 1 / row.sum;
    }

    template <int N> __device__ __forceinline__ void answer(Score (&x)[N], const Score (&)[N]) const {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = answer_exp(x[i] - shift) * inverse;
    }

    // The exponentials count from this thread's own maximum.
    template <int N> __device__ __forceinline__ void answer_held(State own, Score (&x)[N], const Score (&)[N]) const {
      const Score factor = BaseE::exp(own.max - shift) * inverse;
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] *= factor;
    }
  };
};

struct LogSoftmax : Softmax {
  template <int N>
  static __device__ __forceinline__ void take_held(State& pair, Score (&x)[N], const Score (&beside)[N], uint32 present) {
    take(pair, x, beside, present);
  }

  struct Answers {
    Score shift, log_sum;

    explicit __device__ __forceinline__ Answers(State row) {
      shift = BaseE::reference(row.max);
      log_sum = BaseE::log(row.sum);
    }

    template <int N> __device__ __forceinline__ void answer(Score (&x)[N], const Score (&)[N]) const {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = x[i] - shift - log_sum;
    }
    template <int N> __device__ __forceinline__ void answer_held(State, Score (&x)[N], const Score (&y)[N]) const {
      answer(x, y);
    }
  };
};

// A term of a sum, used or not.
__device__ __forceinline__ float exp_in_any_case(float x) { return BaseE::exp_in_sum(x); }
__device__ __forceinline__ double exp_in_any_case(double x) { return exp_of_term_in_any_case(x); }

struct LogSumExp {
  using State = LogSum;
  static __device__ __forceinline__ Score absent() { return -infinity<Score>(); }

  template <int N> static __device__ __forceinline__ void take(State& sum, Score (&x)[N], const Score (&weights)[N], uint32) {
    if (kBeside) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (weights[i] == 0) x[i] = -infinity<Score>();  // gone, whatever it was: 0 * NaN is NaN
      }
    }
    sum.raise(largest(x));
    Score top = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Score weight = kBeside ? weights[i] : Score(1), below = weight * exp_in_any_case(x[i] - sum.max);
      if (x[i] == sum.max) {
        top += weight;
      } else {
        sum.rest += below;
      }
    }
    sum.add_top(top);
  }

  static __device__ __forceinline__ void write(const Params& params, int64 row, State sum) {
    const Score sign = sum.sign();
    const Score infinite = infinity<Score>();
    params.out[row_offset(params, row, params.out_strides)] =
        narrow<Result>(!kSigned && sign < 0 ? infinite - infinite : sum.log_abs());
    if (kSigned) params.sign[row_offset(params, row, params.sign_strides)] = narrow<Result>(sign);
  }
};

// The logits' logsumexp, and with kSigned their sum.
struct CrossEntropy {
  using State = LogSumAndSum;
  static __device__ __forceinline__ Score absent() { return -infinity<Score>(); }

  template <int N> static __device__ __forceinline__ void take(State& state, Score (&x)[N], const Score (&beside)[N], uint32 present) {
    if (kSigned) {
#pragma unroll
      for (int i = 0; i < N; ++i) state.sum += present >> i & 1 ? x[i] : Score(0);
    }
    LogSumExp::take(state.log, x, beside, present);
  }

  static __device__ __forceinline__ void write(const Params& params, int64 row, State state) {
    params.out[row_offset(params, row, params.out_strides)] = narrow<Result>(state.log.log_abs());
    if (kSigned) params.sign[row_offset(params, row, params.sign_strides)] = narrow<Result>(state.sum);
  }
};

// dx = y (dy - sum dy y)
struct SoftmaxBackward {
  using State = Sum;
  static __device__ __forceinline__ Score absent() { return 0; }

  template <int N> static __device__ __forceinline__ void take(State& state, const Score (&dy)[N], const Score (&y)[N], uint32) {
#pragma unroll
    for (int i = 0; i < N; ++i) state.sum += dy[i] * y[i];
  }
  template <int N>
  static __device__ __forceinline__ void take_held(State& state, const Score (&dy)[N], const Score (&y)[N], uint32 present) {
    take(state, dy, y, present);
  }

  struct Answers {
    Score sum;

    explicit __device__ __forceinline__ Answers(State row) : sum(row.sum) {}
    template <int N> __device__ __forceinline__ void answer(Score (&dy)[N], const Score (&y)[N]) const {
#pragma unroll
      for (int i = 0; i < N; ++i) dy[i] = y[i] * (dy[i] - sum);
    }
    template <int N> __device__ __forceinline__ void answer_held(State, Score (&dy)[N], const Score (&y)[N]) const {
      answer(dy, y);
    }
  };
};

// dx = dy - exp(y) sum dy
struct LogSoftmaxBackward {
  using State = Sum;
  static __device__ __forceinline__ Score absent() { return 0; }

  template <int N> static __device__ __forceinline__ void take(State& state, const Score (&dy)[N], const Score (&)[N], uint32) {
#pragma unroll
    for (int i = 0; i < N; ++i) state.sum += dy[i];
  }
  template <int N>
  static __device__ __forceinline__ void take_held(State& state, const Score (&dy)[N], const Score (&y)[N], uint32 present) {
    take(state, dy, y, present);
  }

  struct Answers {
    Score sum;

    explicit __device__ __forceinline__ Answers(State row) : sum(row.sum) {}
    template <int N> __device__ __forceinline__ void answer(Score (&dy)[N], const Score (&y)[N]) const {
#pragma unroll
      for (int i = 0; i < N; ++i) dy[i] -= BaseE::exp(y[i]) * sum;
    }
    template <int N> __device__ __forceinline__ void answer_held(State, Score (&dy)[N], const Score (&y)[N]) const {
      answer(dy, y);
    }
  };
};

// softmax, log_softmax and logsumexp where a row lies denser than its neighbours: the threads of a row read what lies side by side.
//
//   kThreadsPerRow   1 to 32, so that a warp has several rows, or all kThreads of the block
//   kVector          elements a load; aligned, and never across the end of a run
//   kVectors         vectors a thread has at a time: its tile
//   kHeld            a row is one tile of its threads and stays in their registers: one read, one write. Otherwise it is
//                    read twice, by logsumexp once
#include "_softmax/state.cuh"

constexpr int kTile = kVectors * kVector;
constexpr int kRowsPerBlock = kThreads / kThreadsPerRow;
static_assert(kThreadsPerRow <= 32 || kThreadsPerRow == kThreads, "more than a warp for a row means a block for a row");
static_assert((kThreadsPerRow & (kThreadsPerRow - 1)) == 0, "merging halves the threads");

// One thread's share of a row.
struct Share {
  const Element* x;        // [reduced...], the row
  const Element* weights;  // [reduced...]
  Result* out;             // [reduced...]
  int64 columns;           // 0 in threads past the last row, which go along for the merge
  int thread;              // among those of the row

  __device__ __forceinline__ int64 column(int64 first, int vector) const {
    return first + int64(vector * kThreadsPerRow + thread) * kVector;
  }

  // The tile that begins at column `first`; what the row does not have is `absent`.
  __device__ __forceinline__ void load_tile(const Params& params, const Element* row, const Strides& strides, int64 first,
                                            Score absent, Score (&tile)[kTile]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64 at = column(first, v);
      if (at < columns) {
        load<kVector>(row + offset<kReducedAxes>(Index(at), params.reduced, strides.reduced), tile + v * kVector);
      } else {
        fill<kVector>(absent, tile + v * kVector);
      }
    }
  }

  __device__ __forceinline__ void load_scores(const Params& params, int64 first, Score (&scores)[kTile]) const {
    load_tile(params, x, params.x_strides, first, -infinity<Score>(), scores);
  }

  __device__ __forceinline__ void store_tile(const Params& params, int64 first, const Score (&tile)[kTile]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64 at = column(first, v);
      if (at < columns) {
        store<kVector>(tile + v * kVector, out + offset<kReducedAxes>(Index(at), params.reduced, params.out_strides.reduced));
      }
    }
  }
};

// Joins the states of a row's threads; all of them get the result. At most once in a kernel.
template <typename State> __device__ __forceinline__ State merge_row(State state) {
#pragma unroll
  for (int mask = 1; mask < kThreadsPerRow && mask < 32; mask *= 2) state.merge(exchange(state, mask));
  if constexpr (kThreadsPerRow > 32) {
    constexpr int kWarps = kThreads / 32;
    __shared__ State warps_smem[kWarps];
    if (threadIdx.x % 32 == 0) warps_smem[threadIdx.x / 32] = state;
    __syncthreads();  // every warp reads all warps' states
    state = warps_smem[threadIdx.x % kWarps];
#pragma unroll
    for (int mask = 1; mask < kWarps; mask *= 2) state.merge(exchange(state, mask));
  }
  return state;
}

constexpr int64 kStep = int64(kThreadsPerRow) * kTile;  // columns that the threads of a row take at a time

__device__ __forceinline__ void hold(const Params& params, const Share& share) {
  Score scores[kTile];
  share.load_scores(params, 0, scores);
  Pair own = Pair::empty();
  take_held(own, scores);
  Finish(merge_row(own)).answer_held(own, scores);
  share.store_tile(params, 0, scores);
}

__device__ __forceinline__ void read_twice(const Params& params, const Share& share) {
  Score scores[kTile];
  Pair own = Pair::empty();
  for (int64 first = 0; first < share.columns; first += kStep) {
    share.load_scores(params, first, scores);
    take(own, scores);
  }
  const Finish finish(merge_row(own));
  for (int64 first = 0; first < share.columns; first += kStep) {
    share.load_scores(params, first, scores);
    finish.answer(scores);
    share.store_tile(params, first, scores);  // where this thread read: out may be x
  }
}

__device__ __forceinline__ LogSum reduce(const Params& params, const Share& share) {
  Score scores[kTile], weights[kTile];
  LogSum own = LogSum::empty();
  for (int64 first = 0; first < share.columns; first += kStep) {
    share.load_scores(params, first, scores);
    if (kWeighted) share.load_tile(params, share.weights, params.weights_strides, first, Score(0), weights);
    take(own, scores, weights);
  }
  return merge_row(own);
}

// The 1 is said aloud: left to itself, ptxas aims at more blocks and spills for them.
extern "C" __global__ void __launch_bounds__(kThreads, 1) softmax_rows(const __grid_constant__ Params params) {
  const int64 row = int64(blockIdx.x) * kRowsPerBlock + threadIdx.x / kThreadsPerRow;
  const bool present = row < params.rows;
  const Share share = {
      params.x + offset<kOuterAxes>(Index(row), params.outer, params.x_strides.outer),
      params.weights + (kWeighted ? offset<kOuterAxes>(Index(row), params.outer, params.weights_strides.outer) : 0),
      params.out + (kReduces ? 0 : offset<kOuterAxes>(Index(row), params.outer, params.out_strides.outer)),
      present ? params.columns : 0,
      int(threadIdx.x % kThreadsPerRow),
  };
  if constexpr (kReduces) {
    const LogSum sum = reduce(params, share);
    if (present && share.thread == 0) write_sum(params, row, sum);
  } else if constexpr (kHeld) {
    hold(params, share);
  } else {
    read_twice(params, share);
  }
}

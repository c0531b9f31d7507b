// softmax, log_softmax and logsumexp where neighbouring rows lie denser than a row does, as along axis 0 of a C-ordered matrix:
// neighbouring threads take neighbouring rows, here called lanes, and the threads of a lane take every kSlices-th of its elements.
//
//   kLanes    vectors of rows a block has side by side
//   kVector   rows a load
//   kVectors  loads a thread has at a time: its tile
//   kHeld     a row is one tile of its threads and stays in their registers: one read, one write. Otherwise it is read
//             twice, by logsumexp once
#include "_softmax/state.cuh"

constexpr int kSlices = kThreads / kLanes;
constexpr int kSlicesPerWarp = kLanes < 32 ? 32 / kLanes : 1;
constexpr int kGroups = kSlices / kSlicesPerWarp;  // what is left once each warp has merged its slices
static_assert((kLanes & (kLanes - 1)) == 0 && (kSlices & (kSlices - 1)) == 0, "merging halves the slices");
static_assert(kThreads % 32 == 0 && kGroups >= 1, "merging wants whole warps");

// One thread's share of kVector rows.
struct Share {
  const Element* x;        // [reduced...] x kVector, the first of the rows
  const Element* weights;  // [reduced...] x kVector
  Result* out;             // [reduced...] x kVector
  int64 columns;           // 0 in threads past the last row, which go along for the merge
  int lane, slice;

  // Element v of this thread's tile, when the block's tile begins at `first`.
  __device__ __forceinline__ int64 column(int64 first, int v) const { return first + v * kSlices + slice; }

  __device__ __forceinline__ void load_tile(const Params& params, const Element* row, const Strides& strides, int64 first,
                                            Score absent, Score (&tile)[kVector][kVectors]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64 at = column(first, v);
      Score across[kVector];
      if (at < columns) {
        load<kVector>(row + offset<kReducedAxes>(Index(at), params.reduced, strides.reduced), across);
      } else {
        fill<kVector>(absent, across);
      }
#pragma unroll
      for (int c = 0; c < kVector; ++c) tile[c][v] = across[c];
    }
  }

  __device__ __forceinline__ void load_scores(const Params& params, int64 first, Score (&scores)[kVector][kVectors]) const {
    load_tile(params, x, params.x_strides, first, -infinity<Score>(), scores);
  }

  __device__ __forceinline__ void store_tile(const Params& params, int64 first,
                                             const Score (&tile)[kVector][kVectors]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64 at = column(first, v);
      Score across[kVector];
#pragma unroll
      for (int c = 0; c < kVector; ++c) across[c] = tile[c][v];
      if (at < columns) {
        store<kVector>(across, out + offset<kReducedAxes>(Index(at), params.reduced, params.out_strides.reduced));
      }
    }
  }
};

// Joins the states of all slices of each lane; all of them get the results. At most once in a kernel.
template <typename State> __device__ __forceinline__ void merge_slices(const Share& share, State (&states)[kVector]) {
#pragma unroll
  for (int c = 0; c < kVector; ++c) {
#pragma unroll
    for (int mask = kLanes; mask < 32; mask *= 2) states[c].merge(exchange(states[c], mask));
  }
  if constexpr (kGroups > 1) {
    __shared__ State groups_smem[kGroups][kLanes * kVector];
    const int group = share.slice / kSlicesPerWarp;
    const bool speaks = share.slice % kSlicesPerWarp == 0;  // for its warp
    State* mine = groups_smem[group] + share.lane * kVector;
#pragma unroll
    for (int c = 0; c < kVector; ++c) {
      if (speaks) mine[c] = states[c];
    }
#pragma unroll
    for (int step = kGroups / 2; step > 0; step /= 2) {
      __syncthreads();  // the other half is complete
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        if (speaks && group < step) mine[c].merge(groups_smem[group + step][share.lane * kVector + c]);
      }
    }
    __syncthreads();  // group 0 has everything
#pragma unroll
    for (int c = 0; c < kVector; ++c) states[c] = groups_smem[0][share.lane * kVector + c];
  }
}

constexpr int64 kStep = int64(kSlices) * kVectors;  // elements of each row that a block takes at a time

__device__ __forceinline__ void hold(const Params& params, const Share& share) {
  Score scores[kVector][kVectors];
  Pair own[kVector], rows[kVector];
  share.load_scores(params, 0, scores);
#pragma unroll
  for (int c = 0; c < kVector; ++c) {
    own[c] = Pair::empty();
    take_held(own[c], scores[c]);
    rows[c] = own[c];
  }
  merge_slices(share, rows);
#pragma unroll
  for (int c = 0; c < kVector; ++c) Finish(rows[c]).answer_held(own[c], scores[c]);
  share.store_tile(params, 0, scores);
}

__device__ __forceinline__ void read_twice(const Params& params, const Share& share) {
  Score scores[kVector][kVectors];
  Pair rows[kVector];
#pragma unroll
  for (int c = 0; c < kVector; ++c) rows[c] = Pair::empty();
  for (int64 first = 0; first < share.columns; first += kStep) {
    share.load_scores(params, first, scores);
#pragma unroll
    for (int c = 0; c < kVector; ++c) take(rows[c], scores[c]);
  }
  merge_slices(share, rows);
  for (int64 first = 0; first < share.columns; first += kStep) {
    share.load_scores(params, first, scores);
#pragma unroll
    for (int c = 0; c < kVector; ++c) Finish(rows[c]).answer(scores[c]);
    share.store_tile(params, first, scores);  // where this thread read: out may be x
  }
}

__device__ __forceinline__ void reduce(const Params& params, const Share& share, int64 row) {
  Score scores[kVector][kVectors], weights[kVector][kVectors];
  LogSum sums[kVector];
#pragma unroll
  for (int c = 0; c < kVector; ++c) sums[c] = LogSum::empty();
  for (int64 first = 0; first < share.columns; first += kStep) {
    share.load_scores(params, first, scores);
    if (kWeighted) share.load_tile(params, share.weights, params.weights_strides, first, Score(0), weights);
#pragma unroll
    for (int c = 0; c < kVector; ++c) take(sums[c], scores[c], weights[c]);
  }
  merge_slices(share, sums);
  if (share.columns == 0 || share.slice != 0) return;
#pragma unroll
  for (int c = 0; c < kVector; ++c) write_sum(params, row + c, sums[c]);
}

// The 1 is said aloud: left to itself, ptxas aims at more blocks and spills for them.
extern "C" __global__ void __launch_bounds__(kThreads, 1) softmax_columns(const __grid_constant__ Params params) {
  constexpr int kWidth = kLanes * kVector;
  const int64 width = params.outer[kOuterAxes - 1];  // rows that lie side by side
  const int64 tiles = (width + kWidth - 1) / kWidth;
  const int lane = threadIdx.x % kLanes;
  const int64 within = blockIdx.x % tiles * kWidth + lane * kVector;
  const int64 row = blockIdx.x / tiles * width + within;
  const Share share = {
      params.x + offset<kOuterAxes>(Index(row), params.outer, params.x_strides.outer),
      params.weights + (kWeighted ? offset<kOuterAxes>(Index(row), params.outer, params.weights_strides.outer) : 0),
      params.out + (kReduces ? 0 : offset<kOuterAxes>(Index(row), params.outer, params.out_strides.outer)),
      within < width ? params.columns : 0,
      lane,
      int(threadIdx.x / kLanes),
  };
  if constexpr (kReduces) {
    reduce(params, share, row);
  } else if constexpr (kHeld) {
    hold(params, share);
  } else {
    read_twice(params, share);
  }
}

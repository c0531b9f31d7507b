// The softmax family where neighbouring rows lie denser than a row does, as along axis 0 of a C-ordered matrix: neighbouring
// threads take neighbouring rows, here called lanes, and the threads of a lane take every so-many-th of its elements.
//
//   kLanes    vectors of rows a block has side by side
//   kCluster  blocks that share a tile of rows and exchange states only; more than 1 from sm_90 on
//   kVector   rows a load
//   kVectors  loads a thread has at a time: its tile
//   kHeld     a row is one tile of its threads and stays in their registers: one read, one write
//   kKept     otherwise, the first tiles of a thread that stay in shared memory; the others are read twice
//   kPartial  leaves the states of parts of rows in global memory, for a second launch
//   kFinish   the second launch: begins with the states of all parts
#include "_softmax/merge.cuh"

constexpr int kWidth = kLanes * kVector;  // rows of a block
constexpr int kSlices = kThreads / kLanes;
constexpr int kSharing = kSlices * kCluster;  // threads of a row
constexpr int kSlicesPerWarp = kLanes < 32 ? 32 / kLanes : 1;
constexpr int kGroups = kSlices / kSlicesPerWarp;  // what is left once each warp has merged its slices
static_assert((kLanes & (kLanes - 1)) == 0 && (kSlices & (kSlices - 1)) == 0, "merging halves the slices");
static_assert(kThreads % 32 == 0 && kGroups >= 1, "merging wants whole warps");
static_assert(kVectors <= 32, "a row's elements of a tile are told by the bits of a word");

using Loaded = Vector<Element, kVector>;

// One thread's elements at a time, and which of them its rows have.
struct Tile {
  Score x[kVector][kVectors], beside[kVector][kVectors];  // beside: with kBeside
  uint32 present;
};

// One thread's share of kVector rows, or of parts of them.
struct Share {
  const Element* x;       // [reduced...] x kVector, the first of the rows
  const Element* beside;  // [reduced...] x kVector
  Result* out;            // [reduced...] x kVector
  int64 first, end;       // elements; none in threads past the last row, which go along for the merge
  int lane, slice;        // the slice is among those of all the cluster's blocks
  Loaded* kept_smem;      // [kKept, 1 + kBeside, kVectors, kThreads]

  // Element v of this thread's tile that begins at `start`.
  __device__ __forceinline__ int64 column(int64 start, int v) const { return start + v * kSharing + slice; }

  __device__ __forceinline__ int64 along(const Params& params, int64 column, const Strides& strides) const {
    return offset<kReducedAxes>(Index(column), params.reduced, strides.reduced);
  }

  __device__ __forceinline__ Loaded& kept(int step, int operand, int v) const {
    return kept_smem[((step * (1 + kBeside) + operand) * kVectors + v) * kThreads + threadIdx.x];
  }

  // Tile `step`, which begins at element `start`: from global memory, or with kAgain from where it was kept.
  template <bool kAgain> __device__ __forceinline__ Tile tile(const Params& params, int64 start, int step) const {
    Tile tile;
    tile.present = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64 at = column(start, v);
      const bool present = at < end;
      if (present) tile.present |= 1u << v;
      take_in<kAgain>(present, step, x + along(params, at, params.x_strides), kept(step, 0, v), tile.x, v);
      if constexpr (kBeside) {
        take_in<kAgain>(present, step, beside + along(params, at, params.weights_strides), kept(step, 1, v), tile.beside, v);
      }
    }
    return tile;
  }

  template <bool kAgain>
  static __device__ __forceinline__ void take_in(bool present, int step, const Element* from, Loaded& kept,
                                                 Score (&to)[kVector][kVectors], int v) {
    Loaded loaded;
    if (kAgain && step < kKept) {
      loaded = kept;
    } else {
      load<kVector>(from, present, loaded);
      if (step < kKept) kept = loaded;
    }
#pragma unroll
    for (int c = 0; c < kVector; ++c) to[c][v] = present ? widen(loaded.at[c]) : Operation::absent();
  }

  __device__ __forceinline__ void store_tile(const Params& params, int64 start, const Tile& tile) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64 at = column(start, v);
      Score across[kVector];
#pragma unroll
      for (int c = 0; c < kVector; ++c) across[c] = tile.x[c][v];
      store<kVector>(across, at < end, out + along(params, at, params.out_strides));
    }
  }
};

// Joins the states of all slices of each lane; all of them get the results. At most once in a kernel.
__device__ __forceinline__ void merge_slices(const Share& share, State (&states)[kVector]) {
  __shared__ State groups_smem[kGroups][kWidth];
  const int group = threadIdx.x / kLanes / kSlicesPerWarp;
  const bool speaks = threadIdx.x / kLanes % kSlicesPerWarp == 0;  // for its warp
  State* mine = groups_smem[group] + share.lane * kVector;
#pragma unroll
  for (int c = 0; c < kVector; ++c) {
#pragma unroll
    for (int mask = kLanes; mask < 32; mask *= 2) states[c].merge(exchange(states[c], mask));
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
  merge_cluster(groups_smem[0]);
#pragma unroll
  for (int c = 0; c < kVector; ++c) states[c] = groups_smem[0][share.lane * kVector + c];
}

constexpr int64 kStep = int64(kSharing) * kVectors;  // elements of each row that its threads take at a time

__device__ __forceinline__ void take_all(const Params& params, const Share& share, State (&rows)[kVector]) {
#pragma unroll
  for (int c = 0; c < kVector; ++c) rows[c] = State::empty();
  int step = 0;
  for (int64 start = share.first; start < share.end; start += kStep, ++step) {
    Tile tile = share.tile<false>(params, start, step);
#pragma unroll
    for (int c = 0; c < kVector; ++c) Operation::take(rows[c], tile.x[c], tile.beside[c], tile.present);
  }
  merge_slices(share, rows);
}

// Operations that give one answer for a row.
template <typename Operation> __device__ __forceinline__ void reduce(const Params& params, const Share& share, int64 row) {
  State rows[kVector];
  take_all(params, share, rows);
  if (share.first >= share.end || share.slice != 0) return;
#pragma unroll
  for (int c = 0; c < kVector; ++c) Operation::write(params, row + c, rows[c]);
}

template <typename Operation> __device__ __forceinline__ void hold(const Params& params, const Share& share) {
  Tile tile = share.tile<false>(params, share.first, 0);
  State own[kVector], rows[kVector];
#pragma unroll
  for (int c = 0; c < kVector; ++c) {
    own[c] = State::empty();
    Operation::take_held(own[c], tile.x[c], tile.beside[c], tile.present);
    rows[c] = own[c];
  }
  merge_slices(share, rows);
#pragma unroll
  for (int c = 0; c < kVector; ++c) typename Operation::Answers(rows[c]).answer_held(own[c], tile.x[c], tile.beside[c]);
  share.store_tile(params, share.first, tile);
}

// Operations that give as many answers as they take elements, where a thread has several tiles.
template <typename Operation> __device__ __forceinline__ void map(const Params& params, const Share& share, int64 row) {
  State rows[kVector];
  if constexpr (kFinish) {
    __shared__ State rows_smem[kWidth];
    for (int c = threadIdx.x / 32; c < kWidth; c += kThreads / 32) {
      const int64 of = row - share.lane * kVector + c;
      if (of < params.rows) rows_smem[c] = merge_parts(params, of);
    }
    __syncthreads();  // every warp has merged some of the rows
#pragma unroll
    for (int c = 0; c < kVector; ++c) rows[c] = rows_smem[share.lane * kVector + c];
  } else {
    take_all(params, share, rows);
  }
  int step = 0;
  for (int64 start = share.first; start < share.end; start += kStep, ++step) {
    Tile tile = share.tile<true>(params, start, step);
#pragma unroll
    for (int c = 0; c < kVector; ++c) typename Operation::Answers(rows[c]).answer(tile.x[c], tile.beside[c]);
    share.store_tile(params, start, tile);  // where this thread read: out may be x
  }
}

// kBlocks is said aloud: left to itself, ptxas aims at more blocks and spills for them.
extern "C" __global__ void CLUSTER_OF(kCluster) __launch_bounds__(kThreads, kBlocks)
    softmax_columns(const __grid_constant__ Params params) {
  extern __shared__ Loaded kept_smem[];
  if constexpr (kCluster > 1) cluster_arrive();  // merge_cluster waits for it
  const int64 width = params.outer[kOuterAxes - 1];  // rows that lie side by side
  const int64 tiles = (width + kWidth - 1) / kWidth;
  const int64 unit = kPartial || kFinish ? blockIdx.x / params.splits : blockIdx.x / kCluster;
  const int64 split = kPartial || kFinish ? blockIdx.x % params.splits : 0;
  const int lane = threadIdx.x % kLanes;
  const int64 within = unit % tiles * kWidth + lane * kVector;
  const int64 row = unit / tiles * width + within;
  const int64 first = split * params.slice;
  const Share share = {
      params.x + row_offset(params, row, params.x_strides),
      params.weights + (kBeside ? row_offset(params, row, params.weights_strides) : 0),
      params.out + (kReduces ? 0 : row_offset(params, row, params.out_strides)),
      first,
      within < width ? min_of(first + params.slice, params.columns) : first,
      lane,
      int(threadIdx.x / kLanes + blockIdx.x % kCluster * kSlices),
      kept_smem,
  };
  if constexpr (kPartial) {
    State rows[kVector];
    take_all(params, share, rows);
    if (share.first >= share.end || share.slice != 0) return;
#pragma unroll
    for (int c = 0; c < kVector; ++c) *state_of(params, row + c, split) = rows[c];
  } else if constexpr (kReduces) {
    reduce<Operation>(params, share, row);
  } else if constexpr (kHeld) {
    hold<Operation>(params, share);
  } else {
    map<Operation>(params, share, row);
  }
}

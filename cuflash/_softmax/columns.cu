// The softmax family where neighbouring rows lie denser than a row does, as along axis 0 of a C-ordered matrix: neighbouring
// threads take neighbouring rows, here called lanes, and the threads of a lane take every so-many-th of its elements.
//
//   kLanes    vectors of rows a block has side by side
//   kVector   rows a load
//   kVectors  loads a thread has at a time: its tile
//   kHeld     a row is one tile of its threads and stays in their registers: one read, one write. Otherwise it is read
//             twice, by operations that reduce once
//   kPartial  leaves the states of parts of rows in global memory, for a second launch
//   kFinish   the second launch: begins with the states of all parts
#include "_softmax/merge.cuh"

constexpr int kWidth = kLanes * kVector;  // rows of a block
constexpr int kSlices = kThreads / kLanes;
constexpr int kWarps = kThreads / 32;
static_assert((kLanes & (kLanes - 1)) == 0 && (kSlices & (kSlices - 1)) == 0, "merging halves the slices");
static_assert(kThreads % 32 == 0 && kLanes <= 32 && (kWarps & (kWarps - 1)) == 0, "merging wants whole warps");
static_assert(kVectors <= 32, "a row's elements of a tile are told by the bits of a word");

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
  int lane, slice;

  // Element v of this thread's tile that begins at `start`.
  __device__ __forceinline__ int64 column(int64 start, int v) const { return start + v * kSlices + slice; }

  __device__ __forceinline__ int64 along(const Params& params, int64 column, const Strides& strides) const {
    return offset<kReducedAxes>(Index(column), params.reduced, strides.reduced);
  }

  __device__ __forceinline__ Tile tile(const Params& params, int64 start) const {
    Tile tile;
    tile.present = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64 at = column(start, v);
      const bool present = at < end;
      if (present) tile.present |= 1u << v;
      take_in(present, x + along(params, at, params.x_strides), Operation::absent(), tile.x, v);
      if constexpr (kBeside) take_in(present, beside + along(params, at, params.weights_strides), 0, tile.beside, v);
    }
    return tile;
  }

  static __device__ __forceinline__ void take_in(bool present, const Element* from, Score absent,
                                                 Score (&to)[kVector][kVectors], int v) {
    const Vector<Element, kVector> loaded = load<kVector>(from, present, absent);
#pragma unroll
    for (int c = 0; c < kVector; ++c) to[c][v] = widen(loaded.at[c]);
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
  __shared__ State warps_smem[kWarps][kWidth], rows_smem[kWidth];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < kVector; ++c) {
    states[c] = merge_lanes<kLanes, 32>(states[c]);
    if (lane < kLanes) warps_smem[warp][lane * kVector + c] = states[c];
  }
  __syncthreads();  // each warp joins all warps' states of some rows
  for (int c = warp; c < kWidth; c += kWarps) {
    const State state = merge_lanes<1, kWarps>(warps_smem[lane % kWarps][c]);
    if (lane == 0) rows_smem[c] = state;
  }
  __syncthreads();  // all rows are done
#pragma unroll
  for (int c = 0; c < kVector; ++c) states[c] = rows_smem[share.lane * kVector + c];
}

constexpr int64 kStep = int64(kSlices) * kVectors;  // elements of each row that its threads take at a time

__device__ __forceinline__ void take_all(const Params& params, const Share& share, State (&rows)[kVector]) {
#pragma unroll
  for (int c = 0; c < kVector; ++c) rows[c] = State::empty();
  for (int64 start = share.first; start < share.end; start += kStep) {
    Tile tile = share.tile(params, start);
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
  Tile tile = share.tile(params, share.first);
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
  for (int64 start = share.first; start < share.end; start += kStep) {
    Tile tile = share.tile(params, start);
#pragma unroll
    for (int c = 0; c < kVector; ++c) typename Operation::Answers(rows[c]).answer(tile.x[c], tile.beside[c]);
    share.store_tile(params, start, tile);  // where this thread read: out may be x
  }
}

// kBlocks is said aloud: left to itself, ptxas aims at more blocks and spills for them.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks) softmax_columns(const __grid_constant__ Params params) {
  const int64 width = params.outer[kOuterAxes - 1];  // rows that lie side by side
  const int64 tiles = (width + kWidth - 1) / kWidth;
  const int64 unit = kPartial || kFinish ? blockIdx.x / params.splits : blockIdx.x;
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
      int(threadIdx.x / kLanes),
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

// The softmax family where a row lies denser than its neighbours: the threads of a row read what lies side by side.
//
//   kThreadsPerRow   1 to 32, so that a warp has several rows, or all kThreads of a block
//   kCluster         blocks that share a row and exchange states only; more than 1 from sm_90 on
//   kVector          elements a load
//   kDense           the elements of a row lie side by side
//   kRagged          dense rows begin and end anywhere between two vectors; otherwise they, or all their runs, are whole ones
//   kVectors         vectors a thread has at a time: its tile
//   kHeld            a row is one tile of its threads and stays in their registers: one read, one write
//   kKept            otherwise, the first tiles of a thread that stay in shared memory; the others are read twice
//   kPartial         leaves the states of parts of rows in global memory, for a second launch
//   kFinish          the second launch: begins with the states of all parts
#include "_softmax/merge.cuh"

constexpr int kTile = kVectors * kVector;
constexpr int kRowsPerBlock = kThreads / kThreadsPerRow;
constexpr int kSharing = kThreadsPerRow * kCluster;  // threads of a row
static_assert(kThreadsPerRow <= 32 || kThreadsPerRow == kThreads, "more than a warp for a row means a block for a row");
static_assert(kCluster == 1 || kThreadsPerRow == kThreads, "a cluster shares one row");
static_assert((kThreadsPerRow & (kThreadsPerRow - 1)) == 0, "merging halves the threads");
static_assert(kDense || !kRagged, "only dense rows are ragged");
static_assert(kTile <= 32, "a tile's elements are told by the bits of a word");

using Loaded = Vector<Element, kVector>;

// One thread's elements at a time, and which of them the row has.
struct Tile {
  Score x[kTile], beside[kTile];  // beside: with kBeside
  uint32 present;
};

struct Share;

// Which elements of a thread's tile the row has, in few registers.
struct Present {
  int before, after;  // elements from where the tile begins to where the share does, and to where it ends

  __device__ __forceinline__ Present(const Share& share, int64 start);

  // One bit for each element of a vector.
  __device__ __forceinline__ uint32 bits(int vector) const {
    constexpr uint32 kAll = (1u << kVector) - 1;
    const int at = vector * kSharing * kVector;
    if (!kRagged) return at < after ? kAll : 0;
    const int head = max_of(before - at, 0), tail = max_of(at + kVector - after, 0);
    return head < kVector && tail < kVector ? (kAll << head) & (kAll >> tail) : 0;
  }
};

// One thread's share of a row, or of a part of it.
struct Share {
  const Element* x;       // [reduced...], the row
  const Element* beside;  // [reduced...]
  Result* out;            // [reduced...]
  int64 start;            // the first column that is loaded, at a multiple of kVector
  int64 first, end;       // columns of this share; none in threads past the last row, which go along for the merge
  int thread;             // among those of the row
  Loaded* kept_smem;      // [kKept, 1 + kBeside, kVectors, kThreads]

  __device__ __forceinline__ int64 column(int64 start, int vector) const {
    return start + int64(vector * kSharing + thread) * kVector;
  }

  // A dense row needs no arithmetic for its addresses.
  __device__ __forceinline__ int64 along(const Params& params, int64 column, const Strides& strides) const {
    if constexpr (kDense) return column;
    return offset<kReducedAxes>(Index(column), params.reduced, strides.reduced);
  }

  __device__ __forceinline__ Loaded& kept(int step, int operand, int vector) const {
    return kept_smem[((step * (1 + kBeside) + operand) * kVectors + vector) * kThreads + threadIdx.x];
  }

  // Tile `step`, which begins at column `start`: from global memory, or with kAgain from where it was kept.
  template <bool kAgain> __device__ __forceinline__ Tile tile(const Params& params, int64 start, int step) const {
    const Present present(*this, start);
    Tile tile;
    tile.present = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64 at = column(start, v);
      const uint32 bits = present.bits(v);
      tile.present |= bits << (v * kVector);
      take_in<kAgain>(bits, step, x + along(params, at, params.x_strides), kept(step, 0, v), tile.x + v * kVector);
      if constexpr (kBeside) {
        take_in<kAgain>(bits, step, beside + along(params, at, params.weights_strides), kept(step, 1, v),
                        tile.beside + v * kVector);
      }
    }
    return tile;
  }

  template <bool kAgain>
  static __device__ __forceinline__ void take_in(uint32 present, int step, const Element* from, Loaded& kept, Score* to) {
    Loaded loaded;
    if (kAgain && step < kKept) {
      loaded = kept;
    } else {
      load<kVector, kRagged>(from, present, loaded);
      if (step < kKept) kept = loaded;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) to[i] = (kRagged ? present >> i & 1 : present != 0) ? widen(loaded.at[i]) : Operation::absent();
  }

  __device__ __forceinline__ void store_tile(const Params& params, int64 start, const Tile& tile) const {
    const Present present(*this, start);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64 at = column(start, v);
      store<kVector, kRagged>(tile.x + v * kVector, present.bits(v), out + along(params, at, params.out_strides));
    }
  }
};

constexpr int64 kStep = int64(kSharing) * kTile;  // columns that the threads of a row take at a time

__device__ __forceinline__ Present::Present(const Share& share, int64 start) {
  const int64 own = share.column(start, 0);
  before = int(max_of(share.first - own, -kStep));
  after = int(min_of(share.end - own, kStep));
}

// Joins the states of a row's threads; all of them get the result. At most once in a kernel.
__device__ __forceinline__ State merge_row(State state) {
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
    if constexpr (kCluster > 1) {
      __shared__ State block_smem[1];
      if (threadIdx.x == 0) block_smem[0] = state;
      __syncthreads();  // other threads send it to the other blocks
      merge_cluster(block_smem);
      state = block_smem[0];
    }
  }
  return state;
}

__device__ __forceinline__ State take_all(const Params& params, const Share& share) {
  State own = State::empty();
  int step = 0;
  for (int64 start = share.start; start < share.end; start += kStep, ++step) {
    Tile tile = share.tile<false>(params, start, step);
    Operation::take(own, tile.x, tile.beside, tile.present);
  }
  return merge_row(own);
}

// Operations that give one answer for a row.
template <typename Operation> __device__ __forceinline__ void reduce(const Params& params, const Share& share, int64 row) {
  const State state = take_all(params, share);
  if (share.first < share.end && share.thread == 0) Operation::write(params, row, state);
}

// Operations that give as many answers as they take elements.
template <typename Operation> __device__ __forceinline__ void map(const Params& params, Share share, int64 row) {
  if constexpr (kHeld) {
    Tile tile = share.tile<false>(params, share.start, 0);
    State own = State::empty();
    Operation::take_held(own, tile.x, tile.beside, tile.present);
    typename Operation::Answers(merge_row(own)).answer_held(own, tile.x, tile.beside);
    share.thread = recomputed(share.thread);  // the scores need the registers that addresses would be kept in
    share.store_tile(params, share.start, tile);
  } else {
    const typename Operation::Answers answers(kFinish ? merge_parts(params, row) : take_all(params, share));
    int step = 0;
    for (int64 start = share.start; start < share.end; start += kStep, ++step) {
      Tile tile = share.tile<true>(params, start, step);
      answers.answer(tile.x, tile.beside);
      share.store_tile(params, start, tile);  // where this thread read: out may be x
    }
  }
}

// kBlocks is said aloud: left to itself, ptxas aims at more blocks and spills for them.
extern "C" __global__ void CLUSTER_OF(kCluster) __launch_bounds__(kThreads, kBlocks)
    softmax_rows(const __grid_constant__ Params params) {
  extern __shared__ Loaded kept_smem[];
  if constexpr (kCluster > 1) cluster_arrive();  // merge_cluster waits for it
  const int64 unit = int64(blockIdx.x / kCluster) * kRowsPerBlock + threadIdx.x / kThreadsPerRow;
  const int64 row = kPartial || kFinish ? unit / params.splits : unit;
  const int64 split = kPartial || kFinish ? unit % params.splits : 0;
  const Element* x = params.x + row_offset(params, row, params.x_strides);
  // Columns are counted from the last whole vector of memory that is not past the row's beginning; in all arrays alike.
  const int lead = kRagged ? int(reinterpret_cast<uint64>(x) / sizeof(Element) % kVector) : 0;
  const int64 start = split * params.slice;
  const int64 end = min_of(start + params.slice, params.columns);
  const Share share = {
      x - lead,
      params.weights + (kBeside ? row_offset(params, row, params.weights_strides) - lead : 0),
      params.out + (kReduces ? 0 : row_offset(params, row, params.out_strides) - lead),
      start,
      start + lead,
      row < params.rows ? end + lead : start,
      int(threadIdx.x % kThreadsPerRow + blockIdx.x % kCluster * kThreadsPerRow),
      kept_smem,
  };
  if constexpr (kPartial) {
    const State state = take_all(params, share);
    if (share.thread == 0) *state_of(params, row, split) = state;
  } else if constexpr (kReduces) {
    reduce<Operation>(params, share, row);
  } else {
    map<Operation>(params, share, row);
  }
}

// The softmax family for rows that a warp or a block can take.
//
//   kThreadsPerRow   1 to 32, so that a warp has several rows, or all kThreads of a block
//   kHeld            a row is one tile of its threads and stays in their registers: one read, one write. Otherwise it is
//                    read twice, by operations that reduce once
//   kPartial         leaves the states of parts of rows in global memory, for a second launch
//   kFinish          the second launch: begins with the states of all parts
constexpr int kSharing = kThreadsPerRow;
#include "_softmax/rows.cuh"

constexpr int kRowsPerBlock = kThreads / kThreadsPerRow;
static_assert(kThreadsPerRow <= 32 || kThreadsPerRow == kThreads, "more than a warp for a row means a block for a row");
static_assert((kThreadsPerRow & (kThreadsPerRow - 1)) == 0, "merging halves the threads");

// Joins the states of a row's threads; all of them get the result. At most once in a kernel.
__device__ __forceinline__ State merge_row(State state) {
  state = merge_lanes<1, kThreadsPerRow < 32 ? kThreadsPerRow : 32>(state);
  if constexpr (kThreadsPerRow > 32) {
    constexpr int kWarps = kThreads / 32;
    __shared__ State warps_smem[kWarps];
    if (threadIdx.x % 32 == 0) warps_smem[threadIdx.x / 32] = state;
    __syncthreads();  // every warp reads all warps' states
    state = merge_lanes<1, kWarps>(warps_smem[threadIdx.x % kWarps]);
  }
  return state;
}

__device__ __forceinline__ State take_all(const Params& params, const Share& share) {
  State own = State::empty();
  for (int64 start = share.start; start < share.end; start += kStep) {
    Tile tile = load_tile(params, share, start);
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
template <typename Operation> __device__ __forceinline__ void map(const Params& params, const Share& share, int64 row) {
  if constexpr (kHeld) {
    Held<Operation, kPacked> held;
    held.load(params, share);
    held.answer(params, share, merge_row(held.take()));
  } else {
    const typename Operation::Answers answers(kFinish ? merge_parts(params, row) : take_all(params, share));
    for (int64 start = share.start; start < share.end; start += kStep) {
      Tile tile = load_tile(params, share, start);
      answers.answer(tile.x, tile.beside);
      store_tile(params, share, start, tile.x);  // where this thread read: out may be x
    }
  }
}

// kBlocks is said aloud: left to itself, ptxas aims at more blocks and spills for them.
extern "C" __global__ void __launch_bounds__(kThreads, kBlocks) softmax_rows(const __grid_constant__ Params params) {
  const int64 unit = int64(blockIdx.x) * kRowsPerBlock + threadIdx.x / kThreadsPerRow;
  const int64 row = kPartial || kFinish ? unit / params.splits : unit;
  const int64 split = kPartial || kFinish ? unit % params.splits : 0;
  const Share share = share_of(params, row, split, threadIdx.x % kThreadsPerRow);
  if constexpr (kPartial) {
    const State state = take_all(params, share);
    if (share.thread == 0) *state_of(params, row, split) = state;
  } else if constexpr (kReduces) {
    reduce<Operation>(params, share, row);
  } else {
    map<Operation>(params, share, row);
  }
}

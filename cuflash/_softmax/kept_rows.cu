// softmax, log_softmax and their backward passes for long rows, which stay in shared memory between the two passes over them:
// one read, one write.
//
// A cluster of blocks shares a row and exchanges states only. Blocks are persistent, and each thread has a ring of tiles in
// shared memory that it alone fills and reads: while a row is worked on, the tiles of the next ones are on their way. Of a row
// longer than its threads' rings, the tiles that leave early are loaded a second time.
//
//   kCluster   blocks that share a row; more than 1 from sm_90 on
//   kSlots     tiles in a thread's ring
constexpr int kSharing = kThreads * kCluster;
#include "_softmax/rows.cuh"
#include "device/async_copy.cuh"
#include "device/cluster.cuh"

static_assert(sizeof(Loaded) == 16, "copied asynchronously");

constexpr int kWarps = kThreads / 32;
constexpr int kOperands = 1 + kBeside;

// A thread's ring. Tiles are loaded and read in one order, so that a tile's slot is its number in it, modulo kSlots.
struct Ring {
  Loaded* smem;  // [kSlots, kOperands, kVectors, kThreads]

  __device__ __forceinline__ Loaded& at(int slot, int operand, int vector) const {
    return smem[((slot * kOperands + operand) * kVectors + vector) * kThreads + threadIdx.x];
  }

  __device__ __forceinline__ void load(int slot, const Share& share, int64 start) const {
    const Present present(share, start);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64 at_column = share.column(start, v);
      load_vector(present.bits(v), share.x + at_column, at(slot, 0, v));
      if constexpr (kBeside) load_vector(present.bits(v), share.beside + at_column, at(slot, 1, v));
    }
  }

  static __device__ __forceinline__ void load_vector(uint32 present, const Element* from, Loaded& to) {
    if (present == (1u << kVector) - 1) {
      copy_async(&to, from);
    } else if (kRagged && present) {
      ::load<kVector, kRagged>(from, present, to);
    }
  }

  __device__ __forceinline__ Tile read(int slot, const Share& share, int64 start) const {
    const Present present(share, start);
    Tile tile;
    tile.present = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const uint32 bits = present.bits(v);
      tile.present |= bits << (v * kVector);
      widen_present(at(slot, 0, v), bits, Operation::absent(), tile.x + v * kVector);
      if constexpr (kBeside) widen_present(at(slot, 1, v), bits, 0, tile.beside + v * kVector);
    }
    return tile;
  }
};

// What a thread has yet to load: all tiles of a row, those again that will have left the ring, and on to its next row.
struct Loader {
  Ring ring;
  int64 row;
  int tiles, again;  // of each row
  int next;

  __device__ __forceinline__ void load(const Params& params, int slot, int thread) {
    if (row < params.rows) {
      const int tile = next < tiles ? next : next - tiles;
      ring.load(slot, share_of(params, row, 0, thread), tile * kStep);
    }
    close_group();
    if (++next == tiles + again) {
      next = 0;
      row += gridDim.x / kCluster;
    }
  }
};

// Joins the states of all threads of a cluster; all of them get the result. The parity of a thread's rows keeps the states
// of a row from those of the next, which other warps and blocks may already send.
__device__ __forceinline__ State merge_cluster_row(State state, int parity) {
  constexpr int kStates = kCluster * kWarps;
  __shared__ State states_smem[2][kStates];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) state.merge(exchange(state, mask));
  State* mine = &states_smem[parity][blockIdx.x % kCluster * kWarps + warp];
  if constexpr (kCluster > 1) {
    if (lane < kCluster) store_to_block(mine, lane, state);
    cluster_arrive();
    cluster_wait();  // all warps of all blocks have sent theirs
  } else {
    if (lane == 0) *mine = state;
    __syncthreads();  // all warps have written theirs
  }
  state = states_smem[parity][lane % kStates];
#pragma unroll
  for (int i = 32; i < kStates; i += 32) state.merge(states_smem[parity][i + lane]);
#pragma unroll
  for (int mask = 1; mask < kStates && mask < 32; mask *= 2) state.merge(exchange(state, mask));
  return state;
}

extern "C" __global__ void CLUSTER_OF(kCluster) __launch_bounds__(kThreads, kBlocks)
    softmax_kept_rows(const __grid_constant__ Params params) {
  extern __shared__ Loaded ring_smem[];
  const int thread = threadIdx.x + blockIdx.x % kCluster * kThreads;
  const int tiles = int((params.columns + (kRagged ? kVector - 1 : 0) + kStep - 1) / kStep);
  const int kept = min_of(tiles, kSlots);
  int64 row = blockIdx.x / kCluster;
  Loader loader = {{ring_smem}, row, tiles, tiles - kept, 0};
  for (int slot = 0; slot < kSlots; ++slot) loader.load(params, slot, thread);
  if constexpr (kCluster > 1) {
    cluster_arrive();
    cluster_wait();  // only a block that runs can be sent states
  }

  int slot = 0, parity = 0;
  for (; row < params.rows; row += gridDim.x / kCluster, parity ^= 1) {
    const Share share = share_of(params, row, 0, thread);
    State own = State::empty();
    for (int t = 0; t < tiles; ++t) {
      wait_for_groups<kSlots - 1>();  // every step closes one group: the tile of this step is the oldest but those
      Tile tile = loader.ring.read(slot, share, t * kStep);
      Operation::take(own, tile.x, tile.beside, tile.present);
      if (t < tiles - kept) {
        loader.load(params, slot, thread);
      } else {
        close_group();
      }
      slot = slot + 1 == kSlots ? 0 : slot + 1;
    }
    const Operation::Answers answers(merge_cluster_row(own, parity));
    slot = slot >= kept ? slot - kept : slot - kept + kSlots;
    for (int i = 0; i < tiles; ++i) {
      const int t = i < kept ? tiles - kept + i : i - kept;
      wait_for_groups<kSlots - 1>();
      Tile tile = loader.ring.read(slot, share, t * kStep);
      answers.answer(tile.x, tile.beside);
      store_tile(params, share, t * kStep, tile);  // where this thread read: out may be x
      loader.load(params, slot, thread);
      slot = slot + 1 == kSlots ? 0 : slot + 1;
    }
  }
}

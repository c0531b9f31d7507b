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
#include "_softmax/exchange.cuh"
#include "device/async_copy.cuh"

static_assert(sizeof(Loaded) == 16, "copied asynchronously");

constexpr int kOperands = 1 + kBeside;
constexpr uint32 kAll = ~0u;  // the operations here need not know which elements are absent

// A thread's ring. Tiles are loaded and read in one order, so that a tile's slot is its number in it, modulo kSlots.
struct Ring {
  Loaded* smem;  // [kSlots, kOperands, kVectors, kThreads]

  __device__ __forceinline__ Loaded& at(int slot, int operand, int vector) const {
    return smem[((slot * kOperands + operand) * kVectors + vector) * kThreads + threadIdx.x];
  }

  // Starts to load a tile; vectors of which the row has a part are there at once.
  __device__ __forceinline__ void load(int slot, const Share& share, int64 start) const {
    const Present present(share, start);
    const Element* x = share.x + share.column(start, 0);
    const Element* beside = share.beside + share.column(start, 0);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const uint32 bits = present.bits(v);
      const int next = v * kSharing * kVector;
      if (bits == Present::kWhole) {
        copy_async(&at(slot, 0, v), x + next);
        if constexpr (kBeside) copy_async(&at(slot, 1, v), beside + next);
      } else {
        at(slot, 0, v) = part(x + next, bits, Operation::absent());
        if constexpr (kBeside) at(slot, 1, v) = part(beside + next, bits, 0);
      }
    }
  }

  static __device__ __forceinline__ Loaded part(const Element* from, uint32 bits, Score absent) {
    Loaded loaded = filled<kVector>(absent);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (bits >> i & 1) loaded.at[i] = from[i];
    }
    return loaded;
  }

  __device__ __forceinline__ Tile read(int slot) const {
    Tile tile;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      widen_vector(at(slot, 0, v), tile.x + v * kVector);
      if constexpr (kBeside) widen_vector(at(slot, 1, v), tile.beside + v * kVector);
    }
    return tile;
  }
};

// What a thread has yet to load: all tiles of a row, those again that will have left the ring, and on to its next row.
struct Loader {
  Ring ring;
  int tiles, again;  // of each row
  int64 row;
  int next;     // of the row's loads
  Share share;  // of the row

  __device__ __forceinline__ void load(const Params& params, int slot) {
    const int tile = next < tiles ? next : next - tiles;
    ring.load(slot, share, tile * kStep);  // nothing where there is no row
    close_group();
    if (++next == tiles + again) {
      next = 0;
      row += gridDim.x / kCluster;
      share = share_of(params, row, 0, share.thread);
    }
  }
};

// Waits until all but the latest `groups` groups are here, at most kMost.
template <int kMost> __device__ __forceinline__ void wait_for_all_but(int groups) {
  if (groups >= kMost) {
    wait_for_groups<kMost>();
  } else if constexpr (kMost > 0) {
    wait_for_all_but<kMost - 1>(groups);
  }
}

extern "C" __global__ void CLUSTER_OF(kCluster) __launch_bounds__(kThreads, kBlocks)
    softmax_kept_rows(const __grid_constant__ Params params) {
  extern __shared__ Loaded ring_smem[];
  __shared__ Exchange exchange_smem;
  exchange_smem.open();
  const int tiles = int((params.columns + (kRagged ? kVector - 1 : 0) + kStep - 1) / kStep);
  const int kept = min_of(tiles, kSlots), early = tiles - kept;  // early tiles leave the ring, and are loaded again
  int64 row = blockIdx.x / kCluster;
  Share share = share_of(params, row, 0, threadIdx.x + blockIdx.x % kCluster * kThreads);
  Loader loader = {{ring_smem}, tiles, early, row, 0, share};
  for (int slot = 0; slot < kSlots; ++slot) loader.load(params, slot);
  exchange_smem.join();

  int slot = 0;
  for (int number = 0; row < params.rows; ++number) {
    State own = State::empty();
    for (int t = 0; t < tiles; ++t) {
      wait_for_all_but<kSlots - 1>(kSlots - 1 - max_of(t - early, 0));  // as many were loaded after this one
      const Tile tile = loader.ring.read(slot);
      Operation::take(own, tile.x, tile.beside, kAll);
      if (t < early) loader.load(params, slot);
      slot = slot + 1 == kSlots ? 0 : slot + 1;
    }
    const Operation::Answers answers(exchange_smem.merge(own, number));
    slot = slot >= kept ? slot - kept : slot - kept + kSlots;
    for (int i = 0; i < tiles; ++i) {
      const int64 start = (i < kept ? early + i : i - kept) * kStep;
      if (i >= kept) wait_for_groups<kSlots - 1>();  // those that were kept have been here before
      Tile tile = loader.ring.read(slot);
      answers.answer(tile.x, tile.beside);
      store_tile(params, share, start, tile);  // where this thread read: out may be x
      loader.load(params, slot);
      slot = slot + 1 == kSlots ? 0 : slot + 1;
    }
    row += gridDim.x / kCluster;
    share = share_of(params, row, 0, share.thread);
  }
}

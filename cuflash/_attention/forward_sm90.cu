// FlashAttention forward for float16 and bfloat16 on Hopper: one warpgroup has tiles brought by TMA, two others multiply them by wgmma.
//
//   for each tile of kBlockM queries (a thread block), by warpgroups of 64 rows:    Shah et al., "FlashAttention-3", Algorithm 2
//     S = Q K[0]^T;  P = online softmax of S
//     for each tile j of kBlockN keys from the second on:
//       S = Q K[j]^T  and  O += P V[j - 1]  are started
//       P = online softmax of S, while the second product, and the other warpgroup's, are under way
//     O += P V[last]
//
// Keys go from the last to the first, so that tiles with masks come first. Constants: those of tile_loop.cuh, where kThreads are those
// that multiply.
#include "_attention/mma_layout.cuh"
#include "_attention/tile_loop.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"

constexpr int kLoaders = 128;  // threads of the warpgroup that has tiles brought, behind the others
constexpr int kBox = 64;       // columns of 16 bits that TMA brings at a time: rows of 128 bytes

struct HopperParams {
  TensorMap q, k, v;  // (column, row, head, batch, batch) -> element
  Params params;
};

// A tile in shared memory: kBox columns of all rows, then the next kBox.
template <int kRows_, int kColumns> struct BoxedTile {
  static constexpr int kRows = kRows_;
  static constexpr int kBoxes = (kColumns + kBox - 1) / kBox;
  static constexpr int kBoxBytes = kRows * 2 * kBox;
  static constexpr int kBytes = kBoxes * kBoxBytes;

  // Has the columns from k on, 16 of them, multiplied along.
  static __device__ __forceinline__ int along(int k) { return k / kBox * kBoxBytes + k % kBox * 2; }
};

using QTile = BoxedTile<kBlockM, kHeadDim>;
using KTile = BoxedTile<kBlockN, kHeadDim>;
using VTile = BoxedTile<kBlockN, kHeadDimV>;

struct SharedMemory {
  static constexpr int kQ = 0, kK = QTile::kBytes, kV = kK + kStages * KTile::kBytes, kBarriers = kV + kStages * VTile::kBytes;

  struct Barriers {
    Barrier q_full, k_full[kStages], v_full[kStages], k_empty[kStages], v_empty[kStages], v_raw;
  };
  static constexpr int kBytes = kBarriers + 256;
  static_assert(sizeof(Barriers) <= 256, "barriers have room");

  uint32 base;
  Barriers& barriers;

  __device__ __forceinline__ uint32 q() const { return base + kQ; }
  __device__ __forceinline__ uint32 k(int turn) const { return base + kK + turn % kStages * KTile::kBytes; }
  __device__ __forceinline__ uint32 v(int turn) const { return base + kV + turn % kStages * VTile::kBytes; }
};

// The key tiles of a block, in the order of their turns.
struct KeyTiles {
  int first, count;

  __device__ __forceinline__ explicit KeyTiles(const KeyInterval& keys) {
    const int begin = keys.begin(), end = keys.end();
    first = begin / kBlockN;
    count = end > begin ? (end - 1) / kBlockN + 1 - first : 0;
  }
  __device__ __forceinline__ int key(int turn) const { return (first + count - 1 - turn) * kBlockN; }
};

// What a turn's stage has been used for before.
__device__ __forceinline__ int phase(int turn) { return turn / kStages; }

struct Loader {
  const HopperParams& hopper;
  const BlockIndex& index;
  const KeyInterval& keys;
  SharedMemory smem;

  // A warp brings the block's tiles.
  __device__ __forceinline__ void run() const {
    const KeyTiles tiles(keys);
    if (tiles.count == 0) return;
    const Params& params = hopper.params;
    bring_tile<QTile>(smem.q(), hopper.q, params.q, smem.barriers.q_full, index.tile * kBlockM, index.head);
    bring_k(tiles, 0);
#pragma unroll 1
    for (int turn = 0; turn < tiles.count; ++turn) {
      if (turn + 1 < tiles.count) bring_k(tiles, turn + 1);
      bring_v(tiles, turn);
    }
  }

  __device__ __forceinline__ int kv_head() const {
    int head = index.head;
    hopper.params.group.take(head);
    return head;
  }

  __device__ __forceinline__ void bring_k(const KeyTiles& tiles, int turn) const {
    smem.barriers.k_empty[turn % kStages].wait(phase(turn) - 1);
    bring_tile<KTile>(smem.k(turn), hopper.k, hopper.params.k, smem.barriers.k_full[turn % kStages], tiles.key(turn), kv_head());
  }

  // Of V, keys that no row may see become 0: 0 times what lies there may be NaN.
  __device__ __forceinline__ void bring_v(const KeyTiles& tiles, int turn) const {
    auto& barriers = smem.barriers;
    const int key = tiles.key(turn), begin = keys.begin() - key, end = keys.end() - key;
    const bool whole = begin <= 0 && (end >= kBlockN || end + key >= hopper.params.len_k);
    barriers.v_empty[turn % kStages].wait(phase(turn) - 1);
    Barrier& full = barriers.v_full[turn % kStages];
    bring_tile<VTile>(smem.v(turn), hopper.v, hopper.params.v, whole ? full : barriers.v_raw, key, kv_head());
    if (whole) return;
    // At most the first and the last turn come here.
    barriers.v_raw.wait(turn == 0 ? 0 : int(raw_before(tiles)));
    for (int row = 0; row < kBlockN; ++row) {
      if (begin <= row && row < end) continue;
      for (int part = threadIdx.x % 32; part < VTile::kBoxes * kBox / 2; part += 32) {
        const uint32 at = smem.v(turn) + part / 32 * VTile::kBoxBytes + row * 2 * kBox + part % 32 * 4;
        asm volatile("st.shared.b32 [%0], 0;" ::"r"(at) : "memory");
      }
    }
    show_written();
    __syncwarp();
    if (threadIdx.x % 32 == 0) full.arrive();
  }

  // Whether turn 0 had to be cleaned as well.
  __device__ __forceinline__ bool raw_before(const KeyTiles& tiles) const {
    const int key = tiles.key(0), end = keys.end() - key;
    return keys.begin() > key || !(end >= kBlockN || end + key >= hopper.params.len_k);
  }

  template <typename Tile, typename T>
  __device__ __forceinline__ void bring_tile(uint32 to, const TensorMap& map, const Strided<T>& array, Barrier& barrier, int row,
                                             int head) const {
    if (threadIdx.x % 32 != 0) return;
    // Along a broadcast axis the array has one place.
    const auto place = [](int at, int64 stride) { return stride == 0 ? 0 : at; };
    barrier.expect(Tile::kBytes);
#pragma unroll
    for (int box = 0; box < Tile::kBoxes; ++box) {
      bring(to + box * Tile::kBoxBytes, map, barrier, box * kBox, row, place(head, array.head),
            place(index.batch[kBatchAxes - 1], array.batch[kBatchAxes - 1]),
            place(index.batch[kBatchAxes - 2], array.batch[kBatchAxes - 2]));
    }
  }
};

struct HopperProducts : MmaLayout {
  using T = float;
  using Scores = Products64<Element, kBlockN>;
  using Outputs = Products64<Element, kHeadDimV>;

  static __device__ __forceinline__ void start_scores(T (&s)[kRows][kScores], uint32 q_smem, uint32 k_smem) {
    const uint64 q = matrix(q_smem + threadIdx.x / 128 * 64 * 2 * kBox, 0), k = matrix(k_smem, 0);
    products_begin();
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16) Scores::shared(s, q + QTile::along(d) / 16, k + KTile::along(d) / 16, d > 0);
    products_end();
  }

  // P stays in registers: two neighbouring blocks of 8 columns of S are, rounded and paired, one A fragment.
  static __device__ __forceinline__ void pair_up(uint32 (&p)[kBlockN / 16][4], const T (&s)[kRows][kScores], int first, int end) {
#pragma unroll
    for (int k = first; k < end; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = 4 * k + i / 2 * 2;
        p[k][i] = narrow_pair<Element>(s[i % 2][c], s[i % 2][c + 1]);
      }
    }
  }

  static __device__ __forceinline__ void start_outputs(T (&o)[kRows][kOutputs], const uint32 (&p)[kBlockN / 16][4], uint32 v_smem) {
    const uint64 v = matrix(v_smem, VTile::kBoxBytes);
    products_begin();
#pragma unroll
    for (int k = 0; k < kBlockN / 16; ++k) Outputs::registers(o, p[k], v + k * 16 * 2 * kBox / 16);
    products_end();
  }
};

// Two warpgroups, each with 64 rows.
struct Multiplier {
  using Products = HopperProducts;
  static constexpr int kHalf = kBlockN / 32;  // of the 16-key steps of P

  const Params& params;
  const KeyInterval& keys;
  SharedMemory smem;
  Rows<Products> rows;
  uint32 p[kBlockN / 16][4];

  __device__ __forceinline__ bool leads() const { return threadIdx.x % 128 == 0; }

  __device__ __forceinline__ void run() {
    rows.start();
    const KeyTiles tiles(keys);
    if (tiles.count == 0) return rows.finish(params);
    smem.barriers.q_full.wait(0);
    start_scores(0);
    products_wait<0>();
    have_scores(tiles, 0);
    rows.follow(params.scale_log2, [] {});
    rows.template exponentiate<0, Products::kScores>(params.scale_log2);
    Products::pair_up(p, rows.s, 0, kBlockN / 16);
#pragma unroll 1
    for (int turn = 1; turn < tiles.count; ++turn) {
      start_scores(turn);
      start_outputs(turn - 1);
      products_wait<1>();
      have_scores(tiles, turn);
      rows.follow(params.scale_log2, [&] { have_outputs(); });
      rows.template exponentiate<0, 4 * kHalf>(params.scale_log2);
      stay_here(rows.pair[0].sum + rows.pair[1].sum);
      have_outputs();
      if (leads()) smem.barriers.v_empty[(turn - 1) % kStages].arrive();
      Products::pair_up(p, rows.s, 0, kHalf);
      rows.template exponentiate<4 * kHalf, Products::kScores>(params.scale_log2);
      Products::pair_up(p, rows.s, kHalf, kBlockN / 16);
    }
    start_outputs(tiles.count - 1);
    have_outputs();
    rows.finish(params);
  }

  __device__ __forceinline__ void start_scores(int turn) {
    smem.barriers.k_full[turn % kStages].wait(phase(turn));
    Products::start_scores(rows.s, smem.q(), smem.k(turn));
  }

  __device__ __forceinline__ void start_outputs(int turn) {
    smem.barriers.v_full[turn % kStages].wait(phase(turn));
    Products::start_outputs(rows.o, p, smem.v(turn));
  }

  // S is there; rows see of it what they may.
  __device__ __forceinline__ void have_scores(const KeyTiles& tiles, int turn) {
    Products::Scores::settle(rows.s);
    if (leads()) smem.barriers.k_empty[turn % kStages].arrive();
    if (params.factor != 1) rows.multiply_scores(params.factor);
    if (keys.template place<Products::kWarpRows>(tiles.key(turn)) != Place::kInside) rows.mask(keys, tiles.key(turn));
  }

  __device__ __forceinline__ void have_outputs() {
    products_wait<0>();
    Products::Outputs::settle(rows.o);
  }

  // Keeps the compiler from waiting before it has computed this: for a store that never happens, sums being positive.
  __device__ __forceinline__ void stay_here(float sum) const {
    asm volatile("{\n\t.reg .pred never;\n\tsetp.lt.f32 never, %0, 0f00000000;\n\t@never st.shared.f32 [%1], %0;\n\t}" ::"f"(sum),
                 "r"(smem.base)
                 : "memory");
  }
};

extern "C" __global__ void __launch_bounds__(kThreads + kLoaders, 1) attention_forward(const __grid_constant__ HopperParams hopper) {
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& barriers = *reinterpret_cast<SharedMemory::Barriers*>(shared + SharedMemory::kBarriers);
  const SharedMemory smem = {shared_address(shared), barriers};
  if (threadIdx.x == 0) {
    barriers.q_full.init(1);
    barriers.v_raw.init(1);
    for (int stage = 0; stage < kStages; ++stage) {
      barriers.k_full[stage].init(1);
      barriers.v_full[stage].init(1);
      barriers.k_empty[stage].init(kThreads / 128);
      barriers.v_empty[stage].init(kThreads / 128);
    }
    barriers_made();
  }
  __syncthreads();  // barriers are there
  const BlockIndex index(hopper.params);
  const KeyInterval keys(hopper.params, index);
  if (threadIdx.x >= kThreads) {
    keep_registers<40>();
    if (threadIdx.x < kThreads + 32) Loader{hopper, index, keys, smem}.run();
  } else {
    take_registers<232>();
    Multiplier{hopper.params, keys, smem}.run();
  }
}

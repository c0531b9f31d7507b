// FlashAttention forward for float16 and bfloat16 on Hopper: one warpgroup has tiles brought by TMA, two others multiply them by wgmma.
//
//   for each tile of kBlockM queries, by warpgroups of 64 rows:                    Shah et al., "FlashAttention-3", Algorithm 2
//     for each tile j of kBlockN keys:
//       S = Q K[j]^T  and  O += P V[j - 1]  are started
//       P = online softmax of S, while the second product, and the other warpgroup's, are under way
//
// A block goes through several query tiles as through one sequence: the last product of one is started with the first of the next, and
// is stored while other products are under way. Keys go from the last to the first, so that tiles with masks come first.
//
// Constants: those of tile_loop.cuh, where kThreads are those that multiply, and
//   kQStages   query tiles in shared memory at a time
//   kStaged    O leaves by way of shared memory, stored by TMA
#include "_attention/mma_layout.cuh"
#include "_attention/tile_loop.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"

constexpr int kLoaders = 128;  // threads of the warpgroup that has tiles brought, behind the others
constexpr int kGroups = kThreads / 128;  // warpgroups that multiply, each 64 rows
constexpr int kBox = 64;       // columns of 16 bits that TMA brings at a time: rows of 128 bytes

struct HopperParams {
  TensorMap q, k, v, out;  // (column, row, head, batch, batch) -> element; out only if kStaged
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
using OTile = BoxedTile<kBlockM, kHeadDimV>;

// The block goes to and fro over the query tiles, which come with those that see most keys first: so all blocks have as much to do.
struct Job {
  int round = 0;

  __device__ __forceinline__ uint32 number() const {
    const uint32 block = round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    return round * gridDim.x + block;
  }
};

// The key tiles that some query rows see, in the order of their turns: from the last to the first.
struct KeyTiles {
  int first, count;

  __device__ __forceinline__ KeyTiles(int begin, int end) {
    first = begin / kBlockN;
    count = end > begin ? (end - 1) / kBlockN + 1 - first : 0;
  }
  __device__ __forceinline__ int last() const { return first + count - 1; }
  __device__ __forceinline__ int key(int turn) const { return (last() - turn) * kBlockN; }
};

// A query tile as all warps must know it.
struct Task {
  KeyInterval keys;  // of no rows: there is nothing more to do
  KeyTiles tiles;    // that any of the rows sees
  int row, head, kv_head, batch[2];

  __device__ __forceinline__ Task(const Params& params, const BlockIndex& index)
      : keys(params, index), tiles(keys.begin(), keys.end()), row(index.tile * kBlockM), head(index.head), kv_head(index.head) {
    params.group.take(kv_head);
    for (int i = 0; i < 2; ++i) batch[i] = index.batch[kBatchAxes - 1 - i];
  }

  // The tile's first row of an array: the batch has two axes at most.
  template <typename T> __device__ __forceinline__ T* rows_of(const Strided<T>& array) const {
    return array.data + batch[0] * array.batch[kBatchAxes - 1] + batch[1] * array.batch[kBatchAxes - 2] + head * array.head + row * array.row;
  }
};

constexpr int kTasks = 4;  // known at a time: one is being stored, one exponentiated, and two come next

struct SharedMemory {
  static constexpr int kQ = 0, kK = kQStages * QTile::kBytes, kV = kK + kStages * KTile::kBytes;
  static constexpr int kO = kV + kStages * VTile::kBytes;
  static constexpr int kBarriers = kO + (kStaged ? OTile::kBytes : 0), kTaskList = kBarriers + 256, kBytes = kTaskList + 512;

  struct Barriers {
    Barrier task_full[kTasks], task_empty[kTasks], q_full[kQStages], q_empty[kQStages];
    Barrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages], v_raw;
  };
  static_assert(sizeof(Barriers) <= kTaskList - kBarriers && kTasks * sizeof(Task) <= kBytes - kTaskList, "both have room");

  uint32 base;
  Barriers& barriers;
  Task* tasks;

  __device__ __forceinline__ uint32 q(uint32 turn) const { return base + kQ + turn % kQStages * QTile::kBytes; }
  __device__ __forceinline__ uint32 k(uint32 turn) const { return base + kK + turn % kStages * KTile::kBytes; }
  __device__ __forceinline__ uint32 v(uint32 turn) const { return base + kV + turn % kStages * VTile::kBytes; }

  // Task number `turn`, once it is known.
  __device__ __forceinline__ const Task& task(uint32 turn) const {
    barriers.task_full[turn % kTasks].wait(turn / kTasks);
    return known_task(turn);
  }
  __device__ __forceinline__ const Task& known_task(uint32 turn) const { return tasks[turn % kTasks]; }
};

// What all lanes of a warp have in common, for the compiler to know it.
__device__ __forceinline__ int in_common(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// The keys that all rows of this warp see, for what lies within needs no mask. Rows that do not exist do not count.
struct SeenByAll {
  int begin = 0, end = 1 << 30;

  SeenByAll() = default;
  __device__ __forceinline__ explicit SeenByAll(const KeyInterval& keys) {
    const int top = MmaLayout::warp_row(), bottom = min_of(top + MmaLayout::kWarpRows, keys.rows) - 1;
    if (bottom < top) return;
    begin = keys.begin(bottom);
    end = keys.end(top);
  }
  __device__ __forceinline__ bool has_tile(int key) const { return begin <= key && key + kBlockN <= end; }
};

// Along a broadcast axis an array has one place.
__device__ __forceinline__ int place(int at, int64 stride) { return stride == 0 ? 0 : at; }

// Has all boxes of a tile brought, by one lane of a warp, once all lanes have come here: one that lagged two phases behind would wait
// for ever.
template <typename Tile, typename T>
__device__ __forceinline__ void bring_tile(uint32 to, const TensorMap& map, const Strided<T>& array, Barrier& barrier, int row, int head,
                                           const int (&batch)[2]) {
  __syncwarp();  // all lanes have seen the barriers before
  if (threadIdx.x % 32 != 0) return;
  barrier.expect(Tile::kBytes);
#pragma unroll
  for (int box = 0; box < Tile::kBoxes; ++box) {
    bring(to + box * Tile::kBoxBytes, map, barrier, box * kBox, row, place(head, array.head),
          place(batch[0], array.batch[kBatchAxes - 1]), place(batch[1], array.batch[kBatchAxes - 2]));
  }
}

// Has a warp fill in rows of a query tile that see no key: 0, and -inf.
__device__ __forceinline__ void fill_in(const Params& params, const Task& task, int first_row, int end_row) {
  Output* out = task.rows_of(params.out);
  float* lse = task.rows_of(params.lse);
#pragma unroll 1
  for (int row = first_row; row < end_row; ++row) {
    for (int c = threadIdx.x % 32; c < params.head_dim_v; c += 32) out[row * params.out.row + c] = narrow<Output>(0.0f);
    if (params.lse.data != nullptr && threadIdx.x % 32 == 0) lse[row * params.lse.row] = -infinity<float>();
  }
}

// A warp that goes ahead: it says what comes next, has Q brought, and fills in query tiles that see no key by itself.
struct Scheduler {
  const HopperParams& hopper;
  SharedMemory smem;
  uint32 turn = 0;

  __device__ __forceinline__ void run(uint32 jobs) {
#pragma unroll 1
    for (Job job; job.number() < jobs; ++job.round) {
      const Task task(hopper.params, BlockIndex(hopper.params, job.number()));
      if (task.tiles.count == 0) {
        fill_in(hopper.params, task, 0, task.keys.rows);
        continue;
      }
      announce([&](Task& place) { place = task; });
      const Task& known = smem.known_task(turn);  // it need not be held while Q is waited for
      const uint32 stage = turn % kQStages;
      smem.barriers.q_empty[stage].wait(turn / kQStages - 1);
      bring_tile<QTile>(smem.q(turn), hopper.q, hopper.params.q, smem.barriers.q_full[stage], known.row, known.head, known.batch);
      ++turn;
    }
    announce([](Task& place) { place.keys.rows = 0; });
  }

  template <typename Write> __device__ __forceinline__ void announce(Write write) const {
    const uint32 place = turn % kTasks;
    smem.barriers.task_empty[place].wait(turn / kTasks - 1);
    __syncwarp();  // all lanes have seen that
    if (threadIdx.x % 32 != 0) return;
    write(smem.tasks[place]);
    smem.barriers.task_full[place].arrive();
  }
};

// A warp that has all tiles of K brought, or of V, each as soon as its place is free. Turns count through all query tiles.
template <bool kIsV> struct Loader {
  const HopperParams& hopper;
  SharedMemory smem;
  uint32 turn = 0, raw_turn = 0;

  __device__ __forceinline__ void run() {
    for (uint32 number = 0;; ++number) {
      const Task task = smem.task(number);
      if (task.keys.rows == 0) return;
#pragma unroll 1
      for (int tile = task.tiles.last(); tile >= task.tiles.first; --tile, ++turn) {
        if (kIsV) {
          bring_v(task, tile * kBlockN);
        } else {
          bring_k(task, tile * kBlockN);
        }
      }
    }
  }

  __device__ __forceinline__ void bring_k(const Task& task, int key) {
    const uint32 stage = turn % kStages;
    smem.barriers.k_empty[stage].wait(turn / kStages - 1);
    bring_tile<KTile>(smem.k(turn), hopper.k, hopper.params.k, smem.barriers.k_full[stage], key, task.kv_head, task.batch);
  }

  // Of V, keys that no row may see become 0: 0 times what lies there may be NaN. At most the first and the last tile have some.
  __device__ __forceinline__ void bring_v(const Task& task, int key) {
    const uint32 stage = turn % kStages;
    const int begin = task.keys.begin() - key, end = task.keys.end() - key;
    const bool whole = begin <= 0 && (end >= kBlockN || end + key >= hopper.params.len_k);
    Barrier &full = smem.barriers.v_full[stage], &raw = smem.barriers.v_raw;
    smem.barriers.v_empty[stage].wait(turn / kStages - 1);
    bring_tile<VTile>(smem.v(turn), hopper.v, hopper.params.v, whole ? full : raw, key, task.kv_head, task.batch);
    if (whole) return;
    raw.wait(raw_turn++);
#pragma unroll 1
    for (int row = 0; row < kBlockN; ++row) {
      if (row < begin || row >= end) clear_row(smem.v(turn), row);
    }
    show_written();
    __syncwarp();  // all have cleared theirs
    if (threadIdx.x % 32 == 0) full.arrive();
  }

  static __device__ __forceinline__ void clear_row(uint32 v_smem, int row) {
#pragma unroll
    for (int box = 0; box < VTile::kBoxes; ++box) {
      const uint32 at = v_smem + box * VTile::kBoxBytes + row * 2 * kBox + threadIdx.x % 32 * 4;
      asm volatile("st.shared.b32 [%0], 0;" ::"r"(at) : "memory");
    }
  }
};

struct HopperProducts : MmaLayout {
  using T = float;
  using Scores = Products64<Element, kBlockN>;
  using Outputs = Products64<Element, kHeadDimV>;

  static __device__ __forceinline__ void start_scores(T (&s)[kRows][kScores], uint64 q, uint64 k) {
    products_begin();
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16) Scores::shared(s, q + QTile::along(d) / 16, k + KTile::along(d) / 16, d > 0);
    products_end();
  }

  // O is overwritten by the first product of a query tile.
  static __device__ __forceinline__ void start_outputs(T (&o)[kRows][kOutputs], const uint32 (&p)[kBlockN / 16][4], uint64 v, bool adds) {
    products_begin();
#pragma unroll
    for (int k = 0; k < kBlockN / 16; ++k) Outputs::registers(o, p[k], v + k * 16 * 2 * kBox / 16, k > 0 || adds);
    products_end();
  }
};

// The 64 rows of a warpgroup, and P of the key tile before.
struct HopperRows : Rows<HopperProducts> {
  using Products = HopperProducts;
  static constexpr int kSteps = kBlockN / 16;
  static constexpr T kLowest = -3.4028234e38f;  // the reference of rows that have seen nothing: any score exceeds it by far
  static constexpr bool kHopeful = kSlack > 0 && kHeadDimV <= 128;  // for want of registers: S is kept
  uint32 p[kSteps][4];

  // The largest of each row's scores in this thread. In two chains, for one would wait for itself.
  __device__ __forceinline__ void find_highest(T (&highest)[Products::kRows]) const {
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) {
      T chains[2] = {s[r][0], s[r][1]};
#pragma unroll
      for (int c = 2; c < Products::kScores; ++c) chains[c % 2] = max_of(s[r][c], chains[c % 2]);  // a NaN score is passed over
      highest[r] = max_of(chains[0], chains[1]);
    }
  }

  // The references of a new query tile, finite ones. O is not looked at: it is still the one before's.
  __device__ __forceinline__ void begin(T scale) {
    T highest[Products::kRows];
    find_highest(highest);
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) pair[r] = {max_of(kLowest, scale * highest_of_row(highest[r])), T(0)};
  }

  // Raises references that scores exceed by more than kSlack. O is rescaled then, once `settle` has it complete.
  template <typename Settle> __device__ __forceinline__ void follow(T scale, Settle settle) {
    T highest[Products::kRows];
    find_highest(highest);
    bool behind = false;
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) behind |= highest[r] * scale > pair[r].max + kSlack;
    if (__any_sync(0xffffffffu, behind)) {
      settle();
      raise(highest, scale);
    }
  }

  // The weights of some of the 16-key steps, and their sums.
  template <int kFirst, int kCount>
  __device__ __forceinline__ void exponentiate(T scale, T (&weights)[Products::kRows][4 * kCount], T (&sums)[Products::kRows][2]) const {
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < 4 * kCount; ++c) {
        weights[r][c] = exp_2(s[r][4 * kFirst + c] * scale - pair[r].max);
        sums[r][c % 2] += weights[r][c];
      }
    }
  }

  // They become P as A fragments: two neighbouring blocks of 8 columns, rounded and paired, are one.
  template <int kFirst, int kCount> __device__ __forceinline__ void pair_up(const T (&weights)[Products::kRows][4 * kCount]) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = 4 * k + i / 2 * 2;
        p[kFirst + k][i] = narrow_pair<Element>(weights[i % 2][c], weights[i % 2][c + 1]);
      }
    }
  }

  template <int kFirst, int kEnd> __device__ __forceinline__ void make_weights(T scale, T (&sums)[Products::kRows][2]) {
    T weights[Products::kRows][4 * (kEnd - kFirst)];
    exponentiate<kFirst, kEnd - kFirst>(scale, weights, sums);
    pair_up<kFirst, kEnd - kFirst>(weights);
  }

  // Looks at the sums of a tile whose P was made without looking at its scores first. Where one is so large that a score may exceed the
  // reference by more than kSlack, that follows, and so do O, which is complete, and P.
  template <bool kIsRight> __device__ __forceinline__ void check(T scale, T (&sums)[Products::kRows][2]) {
    bool behind = false;
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) behind |= sums[r][0] + sums[r][1] > T(1 << kSlack);
    if (kHopeful && !kIsRight && seldom(__any_sync(0xffffffffu, behind))) {
      T highest[Products::kRows];
      find_highest(highest);
#pragma unroll
      for (int r = 0; r < Products::kRows; ++r) {
        // Of each row by itself, so that rows do not depend on one another.
        const T score = scale * highest_of_row(highest[r]), sum = highest_of_row(sums[r][0] + sums[r][1]);
        const T factor = sum > T(1 << kSlack) ? pair[r].raise(score) : T(1);
        sums[r][0] = sums[r][1] = 0;
#pragma unroll
        for (int c = 0; c < Products::kOutputs; ++c) o[r][c] *= factor;
      }
      make_weights<0, kSteps>(scale, sums);
    }
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) pair[r].sum += sums[r][0] + sums[r][1];
  }

  static __device__ __forceinline__ T highest_of_row(T x) {
    return across_row<Products::kRowLanes>(x, [](T a, T b) { return max_of(a, b); });
  }

  // Scores of keys that their row may not see become -inf: replaced, so that a NaN among them does not survive. Which ones a row sees are
  // bits: of a thread's scores, in the order of their keys, those before an end and not before a beginning.
  __device__ __forceinline__ void mask(const KeyInterval& keys, int first_key) {
    static_assert(Products::kScores <= 32, "a bit for each score");
    const int block_row = recomputed(0);
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) {
      const int row = block_row + Products::row(r), own = first_key + Products::key(0);
      const uint32 seen = before(keys.end(row) - own) & ~before(keys.begin(row) - own);
#pragma unroll
      for (int c = 0; c < Products::kScores; ++c) {
        if (!(seen & 1u << c)) s[r][c] = -infinity<T>();
      }
    }
  }

  // The bits of the scores whose keys, counted from this thread's first, are below `end`: two of every eight are its own.
  static __device__ __forceinline__ uint32 before(int end) {
    const int count = clamp(end >= 0 ? end / 8 * 2 + min_of(end % 8, 2) : 0, 0, 32);
    return count == 32 ? ~0u : (1u << count) - 1;
  }

  // The query tile's sums are complete: lse goes out. Gives what O is to be multiplied by.
  __device__ __forceinline__ void close(const Params& params, const Task& task, T (&inverse)[Products::kRows]) {
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) {
      const int row = Products::row(r);
      pair[r].sum = across_row<Products::kRowLanes>(pair[r].sum, [](T a, T b) { return a + b; });
      const bool empty = pair[r].max == kLowest && pair[r].sum == T(0);  // and no NaN
      if (row < task.keys.rows && params.lse.data != nullptr && Products::key(0) == 0) {
        task.rows_of(params.lse)[row * params.lse.row] = empty ? -infinity<T>() : pair[r].log_sum() * T(kLn2);
      }
      inverse[r] = empty ? T(0) : reciprocal(pair[r].sum);
    }
  }

  // O / d. Rows that saw no key become 0, whatever V holds.
  __device__ __forceinline__ void normalize(const T (&inverse)[Products::kRows]) {
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Products::kOutputs; ++c) o[r][c] *= inverse[r];
      if (seldom(__any_sync(0xffffffffu, inverse[r] == T(0)))) {
#pragma unroll
        for (int c = 0; c < Products::kOutputs; ++c) o[r][c] = inverse[r] == T(0) ? T(0) : o[r][c];
      }
    }
  }

  // Leaves O in shared memory, for TMA.
  __device__ __forceinline__ void stage(uint32 o_smem) const {
    const int lane = threadIdx.x % 32, row = Products::warp_row() + lane % 16;
#pragma unroll
    for (int c = 0; c < Products::kOutputs; c += 4) {
      const int block = c / 2 + lane / 16;  // of 8 columns; the lanes of each half of a warp name the rows of one
      const uint32 at = o_smem + block / 8 * OTile::kBoxBytes + row * 2 * kBox + (block % 8 ^ row % 8) * 16;
      store_matrices(at, narrow_pair<Element>(o[0][c], o[0][c + 1]), narrow_pair<Element>(o[1][c], o[1][c + 1]),
                     narrow_pair<Element>(o[0][c + 2], o[0][c + 3]), narrow_pair<Element>(o[1][c + 2], o[1][c + 3]));
    }
  }

  __device__ __forceinline__ void store(const Params& params, const Task& task) const {
    const bool whole = params.head_dim_v >= kHeadDimV;
    Output* top = task.rows_of(params.out);
    const uint64 alignment = reinterpret_cast<uint64>(top) | params.out.row * sizeof(Output);
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) {
      const int row = Products::row(r);
      const bool exists = row < task.keys.rows;
      Output* out = top + row * params.out.row;
      if (sizeof(Output) == 2 && whole && alignment % 16 == 0) {
        store_blocks(out, o[r], exists);
      } else if (exists && whole && alignment % (2 * sizeof(Output)) == 0) {
        store_pairs(out, o[r]);
      } else if (exists) {
        Rows::store(out, o[r], params.head_dim_v);
      }
    }
  }

  // Of four blocks of 8 columns, each lane of a row has two columns; it gets one block whole. A transposition in two exchanges.
  static __device__ __forceinline__ void store_blocks(Output* row, const T (&o)[Products::kOutputs], bool exists) {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < Products::kOutputs; c += 8) {
      Vector<uint32, 4> block;
#pragma unroll
      for (int i = 0; i < 4; ++i) block.at[i] = narrow_pair<Element>(o[c + 2 * i], o[c + 2 * i + 1]);
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        const bool odd = lane & step;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i & step) continue;
          const uint32 got = __shfl_xor_sync(0xffffffffu, odd ? block.at[i] : block.at[i + step], step);
          if (odd) {
            block.at[i] = got;
          } else {
            block.at[i + step] = got;
          }
        }
      }
      if (exists) *reinterpret_cast<Vector<uint32, 4>*>(row + 4 * c + 8 * lane) = block;
    }
  }
};

// A warpgroup, which has 64 rows of every query tile. Of the tile's keys it leaves out those that none of its rows sees.
struct Multiplier {
  using Products = HopperProducts;
  static constexpr int kSteps = HopperRows::kSteps, kHalf = kSteps / 2;

  const HopperParams& hopper;
  const Params& params;
  SharedMemory smem;
  int group;
  uint64 q_matrix, k_matrix, v_matrix;  // of the first stages
  HopperRows rows;
  uint32 q_turn = 0, turn = 0;  // the newest
  KeyTiles tiles{0, 0};         // of the newest query tile, that this warpgroup's rows see
  SeenByAll seen;

  __device__ __forceinline__ Multiplier(const HopperParams& hopper, SharedMemory smem) : hopper(hopper), params(hopper.params), smem(smem) {
    group = in_common(int(threadIdx.x) / 128);
    q_matrix = matrix(smem.q(0) + group * 64 * 2 * kBox, 0);
    k_matrix = matrix(smem.k(0), 0);
    v_matrix = matrix(smem.v(0), VTile::kBoxBytes);
  }

  __device__ __forceinline__ bool leads() const { return threadIdx.x % 128 == 0; }

  __device__ __forceinline__ void run() {
    while (find_task()) {
      start_scores(turn);
      products_wait<0>();
      have_scores(tiles.key(0));
      rows.begin(params.scale_log2);
      float sums[Products::kRows][2] = {};
      rows.make_weights<0, kSteps>(params.scale_log2, sums);
      rows.check<true>(params.scale_log2, sums);
#pragma unroll 1
      while (go_through_task()) {}
    }
    if (kStaged) stores_wait_read();  // shared memory goes with the block
  }

  // Leaves out query tiles of which this warpgroup has nothing to do; false if there are no others. No product is under way.
  __device__ __forceinline__ bool find_task() {
    for (;; ++q_turn) {
      if (!take_task()) return false;
      if (tiles.count > 0) break;
      const Task& task = smem.known_task(q_turn);
      const int top = Products::warp_row();
      fill_in(params, task, top, min_of(top + Products::kWarpRows, task.keys.rows));
      leave_out_turns(task.tiles.count);
      smem.barriers.q_full[q_turn % kQStages].wait(q_turn / kQStages);
      sync_warpgroup(group);
      release_q(q_turn);
      leave_task(q_turn);
    }
    enter_task();
    return true;
  }

  // The turns of a query tile after the first, and the first of the next one. False if that is not to follow at once.
  __device__ __forceinline__ bool go_through_task() {
    const int count = tiles.count;
    if (count > 1) wait_for_k(turn + 1);
#pragma unroll 1
    for (int i = 1; i < count; ++i) {
      start_scores(++turn);
      start_outputs(turn - 1, i > 1);
      products_wait<1>();
      have_scores(tiles.key(i));
      if (i + 1 < count) wait_for_k(turn + 1);  // now, so that its product will be started at once
      make_weights<false>(turn - 1);
    }
    const Task& task = smem.known_task(q_turn);
    const uint32 last = turn++;
    const int rest = tiles.first - task.tiles.first;
    release_q(q_turn++);
    // V of a turn that is left out comes where that of the last turn is, if there are as many as places.
    const bool more = take_task() && tiles.count > 0 && rest + smem.known_task(q_turn).tiles.last() - tiles.last() < kStages;
    float inverse[Products::kRows];
    if (more) {
      leave_out_turns(rest);
      enter_task();
      start_scores(turn);
      start_outputs(last, count > 1);
      rows.close(params, task, inverse);
      products_wait<1>();
      have_scores(tiles.key(0));
      rows.begin(params.scale_log2);
      make_weights<true>(last);
    } else {
      start_outputs(last, count > 1);
      rows.close(params, task, inverse);
      have_outputs();
      release_v(last);
      leave_out_turns(rest);
    }
    rows.normalize(inverse);
    store(task);
    leave_task(q_turn - 1);
    return more;
  }

  // Waits for the query tile and finds out what this warpgroup has to do of it; false if there is none.
  __device__ __forceinline__ bool take_task() {
    const Task& task = smem.task(q_turn);
    const int top = 64 * group, bottom = min_of(top + 64, task.keys.rows) - 1;
    tiles = bottom < top ? KeyTiles(0, 0) : KeyTiles(task.keys.begin(top), task.keys.end(bottom));
    tiles.first = in_common(tiles.first);
    tiles.count = in_common(tiles.count);
    return task.keys.rows > 0;
  }

  // Waits for Q and the first K.
  __device__ __forceinline__ void enter_task() {
    const Task& task = smem.known_task(q_turn);
    seen = SeenByAll(task.keys);
    leave_out_turns(task.tiles.last() - tiles.last());
    smem.barriers.q_full[q_turn % kQStages].wait(q_turn / kQStages);
    wait_for_k(turn);
  }

  // All warps wait, and for one another: a phase of a barrier that passed unseen would be waited for for ever.
  __device__ __forceinline__ void leave_out_turns(int count) {
#pragma unroll 1
    for (; count > 0; --count, ++turn) {
      wait_for_k(turn);
      smem.barriers.v_full[turn % kStages].wait(turn / kStages);
      sync_warpgroup(group);
      release_k(turn);
      release_v(turn);
    }
  }

  // Of the warps each by itself: products keep those of a warpgroup together, but there may have been none since the task was read.
  __device__ __forceinline__ void leave_task(uint32 turn) {
    __syncwarp();  // all lanes have read it
    if (threadIdx.x % 32 == 0) smem.barriers.task_empty[turn % kTasks].arrive();
  }

  __device__ __forceinline__ void release_q(uint32 turn) {
    if (leads()) smem.barriers.q_empty[turn % kQStages].arrive();
  }
  __device__ __forceinline__ void wait_for_k(uint32 turn) { smem.barriers.k_full[turn % kStages].wait(turn / kStages); }
  __device__ __forceinline__ void release_k(uint32 turn) {
    if (leads()) smem.barriers.k_empty[turn % kStages].arrive();
  }
  __device__ __forceinline__ void release_v(uint32 turn) {
    if (leads()) smem.barriers.v_empty[turn % kStages].arrive();
  }

  __device__ __forceinline__ void start_scores(uint32 turn) {
    const uint64 q = q_matrix + q_turn % kQStages * (QTile::kBytes / 16), k = k_matrix + turn % kStages * (KTile::kBytes / 16);
    Products::start_scores(rows.s, q, k);
  }

  __device__ __forceinline__ void start_outputs(uint32 turn, bool adds) {
    smem.barriers.v_full[turn % kStages].wait(turn / kStages);
    Products::start_outputs(rows.o, rows.p, v_matrix + turn % kStages * (VTile::kBytes / 16), adds);
  }

  // S of the newest turn is there; rows see of it what they may.
  __device__ __forceinline__ void have_scores(int key) {
    Products::Scores::settle(rows.s);
    release_k(turn);
    const bool masked = !seen.has_tile(key);
    if (seldom(masked || params.factor != 1)) {
      if (params.factor != 1) rows.multiply_scores(params.factor);
      if (masked) rows.mask(smem.known_task(q_turn).keys, key);
    }
  }

  __device__ __forceinline__ void have_outputs() {
    products_wait<0>();
    Products::Outputs::settle(rows.o);
  }

  // Each warp has its 16 rows stored by itself.
  __device__ __forceinline__ void store(const Task& task) {
    if (!kStaged) return rows.store(params, task);
    const int top = Products::warp_row();
    const bool stores = threadIdx.x % 32 == 0;
    if (stores) stores_wait_read();
    __syncwarp();  // the rows before have left
    rows.stage(smem.base + SharedMemory::kO);
    show_written();
    __syncwarp();  // all lanes have left theirs
    if (!stores || task.keys.rows <= top) return;
#pragma unroll
    for (int box = 0; box < OTile::kBoxes; ++box) {
      const uint32 from = smem.base + SharedMemory::kO + box * OTile::kBoxBytes + top * 2 * kBox;
      send(hopper.out, from, box * kBox, task.row + top, place(task.head, params.out.head),
           place(task.batch[0], params.out.batch[kBatchAxes - 1]), place(task.batch[1], params.out.batch[kBatchAxes - 2]));
    }
    stores_end();
  }

  // P of the newest turn, while the product of the turn before is under way. The first half of it waits in other registers until the product that reads the P before is complete.
  template <bool kFirstOfTask> __device__ __forceinline__ void make_weights(uint32 before) {
    if (!HopperRows::kHopeful && !kFirstOfTask) rows.follow(params.scale_log2, [&] { have_outputs(); });
    float sums[Products::kRows][2] = {};
    float half[Products::kRows][4 * kHalf];
    rows.exponentiate<0, kHalf>(params.scale_log2, half, sums);
    stay_here(sums[0][0] + sums[1][0]);
    have_outputs();
    release_v(before);
    rows.pair_up<0, kHalf>(half);
    rows.make_weights<kHalf, kSteps>(params.scale_log2, sums);
    rows.check<kFirstOfTask>(params.scale_log2, sums);
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
  const SharedMemory smem = {shared_address(shared), barriers, reinterpret_cast<Task*>(shared + SharedMemory::kTaskList)};
  if (threadIdx.x == kThreads) {
    prefetch(hopper.q);
    prefetch(hopper.k);
    prefetch(hopper.v);
  }
  if (threadIdx.x == 0) {
    barriers.v_raw.init(1);
    for (int place = 0; place < kTasks; ++place) {
      barriers.task_full[place].init(1);
      barriers.task_empty[place].init(kThreads / 32);
    }
    for (int stage = 0; stage < kQStages; ++stage) {
      barriers.q_full[stage].init(1);
      barriers.q_empty[stage].init(kGroups);
    }
    for (int stage = 0; stage < kStages; ++stage) {
      barriers.k_full[stage].init(1);
      barriers.v_full[stage].init(1);
      barriers.k_empty[stage].init(kGroups);
      barriers.v_empty[stage].init(kGroups);
    }
    barriers_made();
  }
  __syncthreads();  // barriers are there
  const Params& params = hopper.params;
  const int jobs = ((params.sweeps - 1) * params.sweep.length + params.last_sweep.length) * ((params.len_q - 1) / kBlockM + 1);
  if (threadIdx.x >= kThreads) {
    keep_registers<kGroups == 3 ? 32 : 40>();
    const int warp = threadIdx.x / 32 - kThreads / 32;
    if (warp == 0) Scheduler{hopper, smem}.run(jobs);
    if (warp == 1) Loader<false>{hopper, smem}.run();
    if (warp == 2) Loader<true>{hopper, smem}.run();
  } else {
    take_registers<kGroups == 3 ? 160 : 232>();
    Multiplier(hopper, smem).run();
  }
}

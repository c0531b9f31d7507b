// What the blocks of forward_sm90.cu have to do, and the warps that go ahead of the arithmetic: one says which query tile comes next and
// has Q brought, two have K and V brought. Everybody else is told by barriers in shared memory.
#include "_attention/tile_loop.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"

constexpr int kGroups = kThreads / 128;  // warpgroups that multiply, each 64 rows
constexpr int kLoaders = 128;            // threads of the warpgroup that has tiles brought, behind the others
constexpr int kLoaderRegisters = kGroups == 3 ? 32 : 40, kRegisters = kGroups == 3 ? 160 : 232;  // of a thread: 65536 in all
static_assert(kLoaders * kLoaderRegisters + kThreads * kRegisters <= 65536, "setmaxnreg would wait for registers that nobody gives");
constexpr int kGroupRows = 64;  // of a warpgroup
constexpr int kBox = 64;        // columns of 16 bits that TMA brings at a time: rows of 128 bytes

struct HopperParams {
  TensorMap q, k, v, out;  // (column, row, head, batch, batch) -> element, but see Task::corner; out only if kStaged
  Params params;
  TensorMap streamed;  // likewise, a row of a column for each key; only if Variant::kStreams
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

using QTile = BoxedTile<kBlockM, kHeadDim>;  // each warpgroup's rows come, and go, by themselves
using KTile = BoxedTile<kBlockN, kHeadDim>;
using VTile = BoxedTile<kBlockN, kHeadDimV>;
using OTile = BoxedTile<kBlockM, kHeadDimV>;
using StreamedTile = BoxedTile<kBlockM, kBlockN>;  // of an array that a variant reads by row and key, its rows as those of Q

// The block goes to and fro over the query tiles, which come with those that see most keys first: so all blocks have as much to do. Where
// variants hide places, or sequences have lengths of their own, nobody has foreseen how much that is, and each block takes what comes next.
struct Job {
  static constexpr bool kTaken = Variant::kHasMask || kVarlen;
  uint32 number = blockIdx.x;
  bool is_going_back = false;

  __device__ __forceinline__ bool is_first() const { return number < gridDim.x; }

  // How many there are. Not held in a register where it can be looked up.
  static __device__ __forceinline__ uint32 count(const Params& params) {
    if (kVarlen) return *params.sequences.tiles * params.heads.length;
    if (Variant::kHasMask) return params.bits.tasks;
    const int pairs = (params.sweeps - 1) * params.sweep.length + params.last_sweep.length;
    return pairs * ((params.len_q - 1) / kBlockM + 1);
  }

  // The number of its query tile.
  __device__ __forceinline__ int task(const TileBits& bits) const {
    return Variant::kHasMask && bits.order != nullptr ? bits.order[number] : number;
  }

  // All of a warp's lanes together.
  __device__ __forceinline__ void advance(const TileBits& bits) {
    if (kTaken) {
      if (threadIdx.x % 32 == 0) number = gridDim.x + atomicAdd(bits.counter, 1u);
      number = __shfl_sync(0xffffffffu, number, 0);
    } else {
      number += 1 + 2 * (is_going_back ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
      is_going_back = !is_going_back;
    }
  }
};

// The key tiles that some query rows see, in the order of their turns: from the last to the first.
struct KeyTiles {
  int first, count;

  KeyTiles() = default;
  __device__ __forceinline__ KeyTiles(int begin, int end) {
    first = begin / kBlockN;
    count = end > begin ? (end - 1) / kBlockN + 1 - first : 0;
  }
  // Those of the rows from `top` to before `end`, as far as they exist.
  __device__ __forceinline__ KeyTiles(const KeyInterval& keys, int top, int end) : KeyTiles(0, 0) {
    const int bottom = min_of(end, keys.rows) - 1;
    if (top <= bottom) *this = KeyTiles(keys.begin(top), keys.end(bottom));
  }
  __device__ __forceinline__ int last() const { return first + count - 1; }
  __device__ __forceinline__ int key(int turn) const { return (last() - turn) * kBlockN; }
};

// Where a tile begins along the axes of a map, but the columns. Along a broadcast axis an array has one place.
struct Corner {
  int at[4];

  template <typename T>
  __device__ __forceinline__ Corner(const Strided<T>& array, int row, int head, const int (&batch)[2])
      : Corner(array.head, array.batch, row, head, batch) {}
  __device__ __forceinline__ Corner(int64 of_head, const int64 (&of_batch)[kBatchAxes], int row, int head, const int (&batch)[2])
      : at{row, place(head, of_head), place(batch[0], of_batch[kBatchAxes - 1]), place(batch[1], of_batch[kBatchAxes - 2])} {}
  static __device__ __forceinline__ int place(int at, int64 stride) { return stride == 0 ? 0 : at; }
};

// A query tile as all warps must know it.
struct Task {
  KeyInterval keys;       // of no rows: there is nothing more to do
  KeyTiles tiles;         // that any of the rows sees
  KeyTiles own[kGroups];  // that any of a warpgroup's rows sees
  int row, head, kv_head, batch[2];
  int first_row, first_key;  // of its sequence
  const uint32* bits;  // where variants hide places: `tiles` count those that are visited

  // All of a warp's lanes together, all of which write the same. What has been written need not be held in registers.
  __device__ __forceinline__ void find(const Params& params, const BlockIndex& index) {
    keys = KeyInterval(params, index);
    tiles = KeyTiles(keys, 0, kBlockM);
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) own[group] = KeyTiles(keys, group * kGroupRows, (group + 1) * kGroupRows);
    row = index.tile * kBlockM;
    head = kv_head = index.head;
    params.group.take(kv_head);
    first_row = index.sequence.first_row;
    first_key = index.sequence.first_key;
    for (int i = 0; i < 2; ++i) batch[i] = index.batch[kBatchAxes - 1 - i];
    if (Variant::kHasMask && keys.rows > 0) count_visits(params.bits, index);
  }

  // Warpgroups then go through all of the tiles.
  __device__ __forceinline__ void count_visits(const TileBits& of_all, const BlockIndex& index) {
    bits = of_all.of(index);
    int count = 0;
    for (int word = threadIdx.x % 32; word < of_all.words; word += 32) count += __popc(bits[word]);
#pragma unroll
    for (int lane = 1; lane < 32; lane *= 2) count += __shfl_xor_sync(0xffffffffu, count, lane);
    tiles.first = 0;
    tiles.count = count;
    for (int group = 0; group < kGroups; ++group) {
      own[group].first = 0;
      own[group].count = group * kGroupRows < keys.rows ? count : 0;
    }
  }

  // What the tile's row i is of.
  __device__ __forceinline__ int row_in_head(int i) const { return row + i >> keys.pack_shift; }
  __device__ __forceinline__ int head_of(int i) const {
    return head << keys.pack_shift | row + i & (1 << keys.pack_shift) - 1;
  }

  __device__ __forceinline__ Variant::Coordinates coordinates(const Params& params, int i) const {
    Variant::Coordinates at = {};
    at.entry[kBatchAxes - 1] = batch[0];
    at.entry[kBatchAxes - 2] = batch[1];
    const int64(&entries)[kBatchAxes] = params.variant.entries;
    at.b = int(params.variant.first + batch[0] * entries[kBatchAxes - 1] + batch[1] * entries[kBatchAxes - 2]);
    at.h = head_of(i);
    at.row = row_in_head(i);
    at.i = at.row + keys.start;
    at.len_q = kVarlen ? params.sequences.each[batch[0]].rows : params.len_q >> keys.pack_shift;
    at.len_k = keys.length;
    at.scale = params.scale;
    return at;
  }

  // Where the sequence begins among the arrays' rows and keys.
  __device__ __forceinline__ int rows_before() const { return kVarlen ? first_row : 0; }
  __device__ __forceinline__ int keys_before() const { return kVarlen ? first_key : 0; }

  // Heads are not packed.
  __device__ __forceinline__ Dropping dropping(const Params& params) const {
    const int64(&entries)[kBatchAxes] = params.dropout.entries;
    return params.dropout.of(head, batch[0] * entries[kBatchAxes - 1] + batch[1] * entries[kBatchAxes - 2]);
  }

  // The tile's row i of an array: the batch has two axes at most.
  template <typename T> __device__ __forceinline__ T* row_of(const Strided<T>& array, int i) const {
    const int64 of_batch = batch[0] * array.batch[kBatchAxes - 1] + batch[1] * array.batch[kBatchAxes - 2];
    return array.data + of_batch + head_of(i) * array.head + (rows_before() + row_in_head(i)) * array.row;
  }

  template <typename T> __device__ __forceinline__ Corner corner_of_keys(const Strided<T>& array, int key) const {
    return Corner(array, keys_before() + key, kv_head, batch);
  }

  // Where they are for the copy engine: of packed heads, the map is (column, head of the pack, row, pack, batch) -> element.
  template <typename T> __device__ __forceinline__ Corner corner(const Strided<T>& array, int i) const {
    Corner corner(array, rows_before() + row + i, head, batch);
    if (keys.pack_shift > 0) {
      corner.at[3] = corner.at[2];
      corner.at[2] = corner.at[1];
      corner.at[1] = corner.at[0] >> keys.pack_shift;
      corner.at[0] = 0;
    }
    return corner;
  }
};

// Goes through the key tiles of a task in the order of their turns, from the last to the first.
struct Walk {
  int tile, first;
  const uint32* bits;
  int word, words;
  uint32 left = 0;

  __device__ __forceinline__ Walk(const Task& task, const TileBits& of_all)
      : tile(task.tiles.last() + 1), first(task.tiles.first), bits(task.bits), word(of_all.words), words(of_all.words) {}

  __device__ __forceinline__ bool next() {
    if (!Variant::kHasMask) return --tile >= first;
    while (left == 0) {
      if (word == 0) return false;
      left = bits[--word];
    }
    const int bit = 31 - __clz(left);
    left ^= 1u << bit;
    tile = word * 32 + bit;
    return true;
  }
  // Whether some row does not see some key.
  __device__ __forceinline__ bool partial() const { return bits[words + word] & 1u << tile % 32; }
};

constexpr int kTasks = 4;  // known at a time: one is being stored, one exponentiated, one comes next, and one is worked out

struct SharedMemory {
  static constexpr int kQ = 0, kK = kQStages * QTile::kBytes, kV = kK + kStages * KTile::kBytes;
  static constexpr int kO = kV + kStages * VTile::kBytes, kStreamed = kO + (kStaged ? OTile::kBytes : 0);
  static constexpr int kBarriers = kStreamed + (Variant::kStreams ? StreamedTile::kBytes : 0);
  static constexpr int kTaskList = kBarriers + 384, kUnread = kTaskList + 384, kBytes = kUnread + 16;

  struct Barriers {
    Barrier task_full[kTasks], task_empty[kTasks], q_full[kQStages][kGroups], q_empty[kQStages][kGroups];
    Barrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages], v_raw;
    Barrier begun;  // the first K has come; V and the second Q wait for that
    int keys[2 * kStages];  // where variants hide places: the first key of a turn's tile, plus 1 if it is partial
    Barrier streamed_full[kGroups], streamed_empty[kGroups];
  };
  static_assert(sizeof(Barriers) <= kTaskList - kBarriers && kTasks * sizeof(Task) <= kUnread - kTaskList, "both have room");

  uint32 base;
  Barriers& barriers;
  Task* tasks;

  __device__ __forceinline__ uint32 q(uint32 turn, int group) const {
    return base + kQ + turn % kQStages * QTile::kBytes + group * kGroupRows * 2 * kBox;
  }
  __device__ __forceinline__ uint32 k(uint32 turn) const { return base + kK + turn % kStages * KTile::kBytes; }
  __device__ __forceinline__ uint32 v(uint32 turn) const { return base + kV + turn % kStages * VTile::kBytes; }
  __device__ __forceinline__ uint32 streamed(int row) const { return base + kStreamed + row * 2 * kBox; }

  // Warps of a warpgroup may still read it when the place of K is given back, but not a turn later.
  __device__ __forceinline__ int& key_of(uint32 turn) const { return barriers.keys[turn % (2 * kStages)]; }

  // Task number `turn`, once it is known.
  __device__ __forceinline__ const Task& task(uint32 turn) const {
    barriers.task_full[turn % kTasks].wait(turn / kTasks);
    return known_task(turn);
  }
  __device__ __forceinline__ const Task& known_task(uint32 turn) const { return tasks[turn % kTasks]; }
};

// What all lanes of a warp have in common, for the compiler to know it.
__device__ __forceinline__ int in_common(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// Has kRows rows of a tile brought, all their boxes, by one lane of a warp, once all lanes have come here: one that lagged two phases
// behind would wait for ever.
template <typename Tile, int kRows>
__device__ __forceinline__ void bring_tile(uint32 to, const TensorMap& map, Barrier& barrier, const Corner& corner, int column = 0) {
  __syncwarp();  // all lanes have seen the barriers before
  if (threadIdx.x % 32 != 0) return;
  barrier.expect(kRows * 2 * kBox * Tile::kBoxes);
#pragma unroll
  for (int box = 0; box < Tile::kBoxes; ++box) {
    bring(to + box * Tile::kBoxBytes, map, barrier, column + box * kBox, corner.at[0], corner.at[1], corner.at[2], corner.at[3]);
  }
}

// Has a warp fill in rows of a query tile that see no key: 0, and -inf or what a sink makes of it.
__device__ __forceinline__ void fill_in(const Params& params, const Task& task, int first_row, int end_row) {
#pragma unroll 1
  for (int row = first_row; row < end_row; ++row) {
    float value = 0, sum = -infinity<float>();
    if (Variant::kHasSink) {
      sum = params.variant.sink(task.coordinates(params, row)) * float(kLn2);
      if (!(sum < infinity<float>())) value = sum = nan<float>();
    }
    Output* out = task.row_of(params.out, row);
    for (int c = threadIdx.x % 32; c < params.head_dim_v; c += 32) out[c] = narrow<Output>(value);
    if (params.lse.data != nullptr && threadIdx.x % 32 == 0) *task.row_of(params.lse, row) = sum;
  }
}

// A warp that goes ahead: it says what comes next, has Q brought, and fills in query tiles that see no key by itself. The first task it
// works out before there are barriers.
struct Scheduler {
  const HopperParams& hopper;
  SharedMemory smem;
  uint32 turn = 0;

  __device__ __forceinline__ void run() {
    const TileBits& bits = hopper.params.bits;
    const uint32 jobs = Job::count(hopper.params);
    Job job;
#pragma unroll 1
    do {
      if (!job.is_first()) wait_for_place();
      Task& task = smem.tasks[turn % kTasks];
      task.find(hopper.params, BlockIndex(hopper.params, job.task(bits)));
      if (job.is_first()) sync_block();
      if (task.tiles.count > 0) {
        announce();
        if (turn == 1) smem.barriers.begun.wait(0);
        bring_q(task);
        ++turn;
      } else {
        fill_in(hopper.params, task, 0, task.keys.rows);
      }
      job.advance(bits);
    } while (job.number < jobs);
    wait_for_place();
    smem.tasks[turn % kTasks].keys.rows = 0;
    announce();
  }

  __device__ __forceinline__ void wait_for_place() const {
    smem.barriers.task_empty[turn % kTasks].wait(turn / kTasks - 1);
    __syncwarp();  // all lanes have seen that
  }

  __device__ __forceinline__ void announce() const {
    __syncwarp();  // all lanes have written it
    if (threadIdx.x % 32 == 0) smem.barriers.task_full[turn % kTasks].arrive();
  }

  __device__ __forceinline__ void bring_q(const Task& task) const {
    const uint32 stage = turn % kQStages;
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
      smem.barriers.q_empty[stage][group].wait(turn / kQStages - 1);
      bring_tile<QTile, kGroupRows>(smem.q(turn, group), hopper.q, smem.barriers.q_full[stage][group],
                                    task.corner(hopper.params.q, group * kGroupRows));
    }
  }
};

// A warp that has all tiles of K brought, or of V, each as soon as its place is free. Turns count through all query tiles. At first all
// blocks ask at the same time: what the first scores are made of comes before anything else.
template <bool kIsV> struct Loader {
  const HopperParams& hopper;
  SharedMemory smem;
  uint32 turn = 0, raw_turn = 0;

  __device__ __forceinline__ void run() {
    for (uint32 number = 0;; ++number) {
      const Task task = smem.task(number);
      if (task.keys.rows == 0) return;
#pragma unroll 1
      for (Walk walk(task, hopper.params.bits); walk.next(); ++turn) {
        if (kIsV) {
          if (turn == 0) smem.barriers.begun.wait(0);
          bring_v(task, walk.tile * kBlockN);
        } else {
          bring_k(task, walk);
          if (turn == 0) begin();
        }
      }
    }
  }

  __device__ __forceinline__ void bring_k(const Task& task, const Walk& walk) {
    const uint32 stage = turn % kStages;
    const int key = walk.tile * kBlockN;
    smem.barriers.k_empty[stage].wait(turn / kStages - 1);
    if (Variant::kHasMask && threadIdx.x % 32 == 0) smem.key_of(turn) = key + walk.partial();
    bring_tile<KTile, kBlockN>(smem.k(turn), hopper.k, smem.barriers.k_full[stage], task.corner_of_keys(hopper.params.k, key));
  }

  __device__ __forceinline__ void begin() const {
    smem.barriers.k_full[0].wait(0);
    __syncwarp();
    if (threadIdx.x % 32 == 0) smem.barriers.begun.arrive();
  }

  // Of V, keys that no row may see become 0: 0 times what lies there may be NaN. At most the first and the last tile have some.
  __device__ __forceinline__ void bring_v(const Task& task, int key) {
    const uint32 stage = turn % kStages;
    const int begin = task.keys.begin() - key, end = task.keys.end() - key;
    const bool whole = begin <= 0 && (end >= kBlockN || task.keys_before() + end + key >= hopper.params.len_k);
    Barrier &full = smem.barriers.v_full[stage], &raw = smem.barriers.v_raw;
    smem.barriers.v_empty[stage].wait(turn / kStages - 1);
    bring_tile<VTile, kBlockN>(smem.v(turn), hopper.v, whole ? full : raw, task.corner_of_keys(hopper.params.v, key));
    if (whole) return;
    raw.wait(raw_turn++);
    clear_rows(smem.v(turn), 0, begin);
    clear_rows(smem.v(turn), end, kBlockN);
    show_written();
    __syncwarp();  // all have cleared theirs
    if (threadIdx.x % 32 == 0) full.arrive();
  }

  // Four rows at a time, 16 bytes a lane.
  static __device__ __forceinline__ void clear_rows(uint32 v_smem, int begin, int end) {
#pragma unroll 1
    for (int row = begin + threadIdx.x % 32 / 8; row < end; row += 4) {
#pragma unroll
      for (int box = 0; box < VTile::kBoxes; ++box) {
        const uint32 at = v_smem + box * VTile::kBoxBytes + row * 2 * kBox + threadIdx.x % 8 * 16;
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
      }
    }
  }
};

// A warp that has tiles brought of the array that a variant reads by row and key: of each warpgroup's rows by themselves, and only those
// of its own turns. There is one place for each. It is read as soon as the scores are there and given back at once, so that the next tile
// has until the next scores. A template, for `Own` has such an array only where kStreams.
template <typename Own> struct Streamer {
  const HopperParams& hopper;
  SharedMemory smem;
  uint32 phases = ~0u;  // of each warpgroup's place: the lowest bit of the one that must be over

  // The task is not copied, for want of registers. It stays where it is until the tile that comes last has been read, and that has rows of
  // some warpgroup: whose those are is looked up before the first of them is brought.
  __device__ __forceinline__ void run() {
    for (uint32 number = 0;; ++number) {
      const Task& task = smem.task(number);
      if (task.keys.rows == 0) return;
#pragma unroll 1
      for (Walk walk(task, hopper.params.bits); walk.next();) {
        const uint32 wanted = groups_of(task, walk.tile);
#pragma unroll 1
        for (int group = 0; group < kGroups; ++group) {
          if (wanted & 1u << group) bring_rows(task, group, walk.tile * kBlockN);
        }
      }
    }
  }

  // A bit for each warpgroup that goes through a tile. Where variants hide places, `own` counts those that are visited, all or none.
  static __device__ __forceinline__ uint32 groups_of(const Task& task, int tile) {
    uint32 bits = 0;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const KeyTiles& own = task.own[group];
      const bool goes = own.count > 0 && (Own::kHasMask || (own.first <= tile && tile <= own.last()));
      bits |= uint32(goes) << group;
    }
    return bits;
  }

  __device__ __forceinline__ void bring_rows(const Task& task, int group, int key) {
    const Own& variant = hopper.params.variant;
    const int row = group * kGroupRows;
    smem.barriers.streamed_empty[group].wait(phases >> group);
    phases ^= 1u << group;
    bring_tile<StreamedTile, kGroupRows>(
        smem.streamed(row), hopper.streamed, smem.barriers.streamed_full[group],
        Corner(variant.streamed_head(), variant.streamed().batch, task.row + row, task.head, task.batch), key);
  }
};

// FlashAttention forward for float16 and bfloat16 on Hopper: one warpgroup has tiles brought by TMA, the others multiply them by wgmma.
//
//   for each tile of kBlockM queries, by warpgroups of 64 rows:                    Shah et al., "FlashAttention-3", Algorithm 2
//     for each tile j of kBlockN keys:
//       S = Q K[j]^T  and  O += P V[j - 1]  are started
//       P = online softmax of S, while the second product, and the other warpgroups', are under way
//
// A block goes through several query tiles as through one sequence: the last product of one is started with the first of the next, and
// is stored while other products are under way. Keys go from the last to the first, so that tiles with masks come first.
//
// Constants: those of tile_loop.cuh, where kThreads are those that multiply, and
//   kQStages        query tiles in shared memory at a time
//   kStaged         O leaves by way of shared memory, stored by TMA
//   kWeightsFirst   registers hold S until its weights are known to be right: its maximum is looked for afterwards, if at all
//   kHalfAhead      half of the weights are made before O is waited for
#include "_attention/hopper_rows.cuh"

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

// A warpgroup, which has 64 rows of every query tile. Of the tile's keys it leaves out those that none of its rows sees. Warpgroups start
// their products one after another in every turn, so that each one's softmax falls into the products of others (docs/hopper.rst).
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
  uint32 last = 0;              // the turn whose product is the next one of O
  bool adds = false;            // whether there is an O before that
  int rest = 0;                 // turns of the query tile before that are left out behind its last
  uint32 streamed = 0;          // turns whose scores a variant has had an array brought for
  KeyTiles tiles{0, 0};         // of the newest query tile, that this warpgroup's rows see
  SeenByAll seen;
  HopperRows::ScoresAlong along;

  __device__ __forceinline__ Multiplier(const HopperParams& hopper, SharedMemory smem) : hopper(hopper), params(hopper.params), smem(smem) {
    group = in_common(int(threadIdx.x) / 128);
    q_matrix = matrix(smem.q(0, group), 0);
    k_matrix = matrix(smem.k(0), 0);
    v_matrix = matrix(smem.v(0), VTile::kBoxBytes);
  }

  __device__ __forceinline__ bool leads() const { return threadIdx.x % 128 == 0; }

  __device__ __forceinline__ void run() {
    if (group == kGroups - 1) let_next_go();
    bool begins = find_task(), ends = false;  // a query tile, and the one before it
#pragma unroll 1
    while (begins || ends) {
      float inverse[Products::kRows];
      const Task& before = smem.known_task(q_turn - 1);
      if (begins) {
        begin_task(ends, before, inverse);
      } else {
        end_task(before, inverse);
      }
      if (ends) {
        rows.normalize(inverse);
        store(before);
        leave_task(q_turn - 1);
      }
      ends = begins;
      begins = begins ? go_through_task() : find_task();
    }
    if (group == 0) wait_to_be_let_go(group);  // for the last time: the line ends empty
    if (kStaged) stores_wait_read();           // shared memory goes with the block
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
      wait_for_q();
      sync_warpgroup(group);
      release_q();
      leave_task(q_turn);
    }
    enter_task();
    return true;
  }

  // The first turn of a query tile, with the last product of the one before. If there is none, it is of whatever lies there, and nobody
  // reads it: were it started under a condition, the assembler would have all products wait for one another.
  __device__ __forceinline__ void begin_task(bool ends, const Task& before, float (&inverse)[Products::kRows]) {
    wait_to_be_let_go(group);
    start_scores(turn);
    if (ends) wait_for_v(last);
    start_outputs(last, adds, [&] { let_next_go(); });
    look_at_keys();
    if (ends) rows.close(params, before, inverse);
    look_up(0);
    products_wait<1>();
    have_scores(0);
    rows.begin(rows.scale_of(params));
    make_weights<true>(ends);
  }

  // The last product of a query tile that no other follows at once.
  __device__ __forceinline__ void end_task(const Task& task, float (&inverse)[Products::kRows]) {
    wait_for_v(last);
    start_outputs(last, adds, [] {});
    rows.close(params, task, inverse);
    have_outputs();
    release_v(last);
    leave_out_turns(rest);
  }

  // The turns of a query tile after the first. False if the first of the next one is not to follow at once.
  __device__ __forceinline__ bool go_through_task() {
    const int count = tiles.count;
    if (count > 1) wait_for_k(turn + 1);
#pragma unroll 1
    for (int i = 1; i < count; ++i) {
      wait_to_be_let_go(group);
      last = turn++;
      start_scores(turn);
      wait_for_v(last);
      start_outputs(last, i > 1, [&] { let_next_go(); });
      look_up(i);
      products_wait<1>();
      have_scores(i);
      if (i + 1 < count) wait_for_k(turn + 1);  // now, so that its product will be started at once
      make_weights<false>(true);
    }
    last = turn++;
    adds = count > 1;
    rest = tiles.first - smem.known_task(q_turn).tiles.first;
    ++q_turn;
    // After so many turns that are left out, V would have to come where that of the last turn still is. Others wait for it before they
    // let this warpgroup go.
    if (!take_task() || tiles.count == 0 || rest + smem.known_task(q_turn).tiles.last() - tiles.last() >= kStages) return false;
    leave_out_turns(rest);
    enter_task();
    return true;
  }

  // Waits for the next query tile; false if there is none.
  __device__ __forceinline__ bool take_task() {
    const Task& task = smem.task(q_turn);
    tiles.first = in_common(task.own[group].first);
    tiles.count = in_common(task.own[group].count);
    return in_common(task.keys.rows) > 0;
  }

  // Waits for Q and the first K.
  __device__ __forceinline__ void enter_task() {
    leave_out_turns(smem.known_task(q_turn).tiles.last() - tiles.last());
    wait_for_q();
    wait_for_k(turn);
  }

  __device__ __forceinline__ void look_at_keys() { seen = SeenByAll(smem.known_task(q_turn).keys); }

  __device__ __forceinline__ void let_next_go() const { let_go(group + 1 < kGroups ? group + 1 : 0); }

  // All warps wait, and for one another before a place is given back: a phase of a barrier that passed unseen would be waited for for ever.
  __device__ __forceinline__ void leave_out_turns(int count) {
#pragma unroll 1
    for (; count > 0; --count, ++turn) {
      wait_to_be_let_go(group);
      let_next_go();
      wait_for_k(turn);
      wait_for_v(turn);
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

  __device__ __forceinline__ void wait_for_q() { smem.barriers.q_full[q_turn % kQStages][group].wait(q_turn / kQStages); }
  __device__ __forceinline__ void release_q() {
    if (leads()) smem.barriers.q_empty[q_turn % kQStages][group].arrive();
  }
  __device__ __forceinline__ void wait_for_k(uint32 turn) { smem.barriers.k_full[turn % kStages].wait(turn / kStages); }
  __device__ __forceinline__ void wait_for_v(uint32 turn) { smem.barriers.v_full[turn % kStages].wait(turn / kStages); }
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

  template <typename Do> __device__ __forceinline__ void start_outputs(uint32 turn, bool adds, Do before_last) {
    Products::start_outputs(rows.o, rows.p, v_matrix + turn % kStages * (VTile::kBytes / 16), adds, before_last);
  }

  // The first key of the query tile's turn i, the newest, plus 1 where a mask hides some place.
  __device__ __forceinline__ int place_of(int i) const { return Variant::kHasMask ? smem.key_of(turn) : tiles.key(i); }

  // What a variant reads for the scores of turn i, while they are under way.
  __device__ __forceinline__ void look_up(int i) {
    const Task& task = smem.known_task(q_turn);
    rows.look_up(along, params.variant, place_of(i) & ~1, [&](int row) { return task.coordinates(params, row); });
  }

  // S of turn i is there; rows see of it what they may.
  __device__ __forceinline__ void have_scores(int i) {
    const int place = place_of(i), key = place & ~1;  // a multiple of kBlockN
    Products::Scores::settle(rows.s);
    if (kDropout) rows.meet(smem.known_task(q_turn), params, key);
    release_k(turn);
    if (i + 1 == tiles.count) release_q();
    const Task& task = smem.known_task(q_turn);
    const auto where = [&](int row) { return task.coordinates(params, row); };
    const bool masked = !seen.has_tile(key), partial = Variant::kHasMask && place & 1, hides = kMaskInLoop && partial;
    bool turned = !Variant::kHasScore && params.factor != 1;
    if (Variant::kHasScore) {
      if (Variant::kStreams) smem.barriers.streamed_full[group].wait(streamed++);
      rows.vary(params.variant, along, key, where, [&](Variant::ScoreReads& reads, int keys, int r) { fetch(reads, keys, r); });
    }
    if (Variant::kHasMask && !kMaskInLoop) {
      if (seldom(turned)) rows.multiply_scores(params.factor);  // before -inf is among them
      turned = false;
      if (partial) rows.hide_one_by_one(params.variant, key, where);
    }
    if (hides || seldom(masked || turned)) {
      if (turned) rows.multiply_scores(params.factor);
      uint32 shown[Products::kRows] = {~0u, ~0u};
      if (masked) rows.leave_out_unseen(shown, task.keys, key);
      if (hides) rows.leave_out_hidden(shown, params.variant, key, where);
      rows.leave(shown);
    }
  }

  // What the tile that was brought for these scores has for row r of a lane and the 32 keys number `keys`. Each warp reads its own rows,
  // and gives the place back with the last.
  template <typename Reads> __device__ __forceinline__ void fetch(Reads& reads, int keys, int r) {
    if constexpr (Variant::kStreams) {
      reads.fetch([&](uint32(&words)[4]) { load_matrices(words, rows.streamed(smem.streamed(0), keys, r)); });
      if (keys != (kBlockN - 1) / 32 || r + 1 != Products::kRows) return;
      __syncwarp();  // all lanes have read theirs
      if (threadIdx.x % 32 == 0) smem.barriers.streamed_empty[group].arrive();
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
    if (kVarlen) return rows.store_staged(params, task, smem.base + SharedMemory::kO);
    show_written();
    __syncwarp();  // all lanes have left theirs
    if (!stores || task.keys.rows <= top) return;
    const Corner corner = task.corner(params.out, top);
#pragma unroll
    for (int box = 0; box < OTile::kBoxes; ++box) {
      const uint32 from = smem.base + SharedMemory::kO + box * OTile::kBoxBytes + top * 2 * kBox;
      send(hopper.out, from, box * kBox, corner.at[0], corner.at[1], corner.at[2], corner.at[3]);
    }
    stores_end();
  }

  // P of the newest turn, while the product of the turn before is under way, if there is one: half of the weights wait until that has read
  // the P before.
  template <bool kFirstOfTask> __device__ __forceinline__ void make_weights(bool has_product) {
    if (!HopperRows::kLooksAfterwards && !kFirstOfTask) rows.follow(rows.scale_of(params), [&] { have_outputs(); });
    float sums[Products::kRows][2] = {};
    float half[Products::kRows][4 * kHalf];
    rows.exponentiate<0, kHalf>(rows.scale_of(params), half, sums);
    if (kHalfAhead) stay_here((sums[0][0] + sums[0][1]) + (sums[1][0] + sums[1][1]));
    have_outputs();
    if (has_product) release_v(last);
    rows.pair_up<0, kHalf>(half);
    rows.make_weights<kHalf, kSteps>(rows.scale_of(params), sums);
    rows.catch_up<kFirstOfTask>(rows.scale_of(params), sums);
  }

  // Keeps the compiler from waiting before it has computed this: for a store, of a sum that is beyond all that is usual, to where nobody
  // reads. A condition that exponentials never meet the assembler would know.
  __device__ __forceinline__ void stay_here(float sum) const {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.gt.f32 p, %0, 0f7f000000;\n\t@p st.shared.f32 [%1], %0;\n\t}" ::"f"(sum),
                 "r"(smem.base + SharedMemory::kUnread)
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
    if (Variant::kStreams) prefetch(hopper.streamed);
  }
  if (threadIdx.x == 0) {
    barriers.v_raw.init(1);
    barriers.begun.init(1);
    for (int place = 0; place < kTasks; ++place) {
      barriers.task_full[place].init(1);
      barriers.task_empty[place].init(kThreads / 32);
    }
    for (int stage = 0; stage < kQStages; ++stage) {
      for (int group = 0; group < kGroups; ++group) {
        barriers.q_full[stage][group].init(1);
        barriers.q_empty[stage][group].init(1);
      }
    }
    for (int group = 0; Variant::kStreams && group < kGroups; ++group) {
      barriers.streamed_full[group].init(1);
      barriers.streamed_empty[group].init(128 / 32);
    }
    for (int stage = 0; stage < kStages; ++stage) {
      barriers.k_full[stage].init(1);
      barriers.v_full[stage].init(1);
      barriers.k_empty[stage].init(kGroups);
      barriers.v_empty[stage].init(kGroups);
    }
    barriers_made();
  }
  if (threadIdx.x >= kThreads) {
    keep_registers<kLoaderRegisters>();
    const int warp = threadIdx.x / 32 - kThreads / 32;
    if (warp == 0) return Scheduler{hopper, smem}.run();
    sync_block();  // barriers are there
    if (warp == 1) Loader<false>{hopper, smem}.run();
    if (warp == 2) Loader<true>{hopper, smem}.run();
    if constexpr (Variant::kStreams) {
      if (warp == 3) Streamer<Variant>{hopper, smem}.run();
    }
  } else {
    sync_block();
    take_registers<kRegisters>();
    Multiplier(hopper, smem).run();
  }
}

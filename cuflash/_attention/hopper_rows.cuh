// The arithmetic of a warpgroup of forward_sm90.cu: products by wgmma, and the online softmax of 64 rows.
#include "_attention/hopper_tasks.cuh"
#include "_attention/mma_layout.cuh"
#include "device/mma.cuh"
#include "device/wgmma.cuh"

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

  // O is overwritten by the first product of a query tile. Products from registers are started one by one, as the tensor cores get on:
  // there is something to do shortly before they run out of work.
  template <typename Do>
  static __device__ __forceinline__ void start_outputs(T (&o)[kRows][kOutputs], const uint32 (&p)[kBlockN / 16][4], uint64 v, bool adds,
                                                       Do before_last) {
    products_begin();
#pragma unroll
    for (int k = 0; k < kBlockN / 16; ++k) {
      if (k + 1 == kBlockN / 16) before_last();
      Outputs::registers(o, p[k], v + k * 16 * 2 * kBox / 16, k > 0 || adds);
    }
    products_end();
  }
};

// The 64 rows of a warpgroup, and P of the key tile before.
struct HopperRows : Rows<HopperProducts> {
  using Products = HopperProducts;
  static constexpr int kSteps = kBlockN / 16;
  static constexpr T kLowest = -3.4028234e38f;  // the reference of rows that have seen nothing, which finite scores exceed by far
  static constexpr bool kLooksAfterwards = kWeightsFirst && kSlack > 0;
  uint32 p[kSteps][4];
  // With dropout: where the weights of the newest key tile stand.
  Dropping dropping;
  uint32 row_place, key_place;

  // Read again in each turn, not held in registers through it.
  __device__ __forceinline__ void meet(const Task& task, const Params& params, int key) {
    dropping = task.dropping(params);
    row_place = Dropping::row_place(task.row + Products::row(0));
    key_place = Dropping::key_place(key + Products::key(0));
  }

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

  // The weights of some of the 16-key steps, and their sums. What dropout drops has been counted when it becomes 0.
  template <int kFirst, int kCount>
  __device__ __forceinline__ void exponentiate(T scale, T (&weights)[Products::kRows][4 * kCount], T (&sums)[Products::kRows][2]) const {
    constexpr int kAtOnce = kDropout ? 4 : 4 * kCount;  // one call of random numbers is for four of each row
#pragma unroll
    for (int first = 0; first < 4 * kCount; first += kAtOnce) {
#pragma unroll
      for (int r = 0; r < Products::kRows; ++r) {
#pragma unroll
        for (int c = first; c < first + kAtOnce; ++c) {
          weights[r][c] = exp_2(s[r][4 * kFirst + c] * scale - pair[r].max);
          sums[r][c % 2] += weights[r][c];
        }
      }
      if (kDropout) dropping.drop(weights[0], weights[1], first, row_place, key_place + 4 * kFirst + first);
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

  // Adds up the sums of a tile. Where its P was made without looking at the scores first, and a sum is so large that one of them may exceed
  // the reference by more than kSlack: raises the reference before, rescales O, which is complete, and makes P again.
  template <bool kReferenceIsMaximum> __device__ __forceinline__ void catch_up(T scale, T (&sums)[Products::kRows][2]) {
    bool behind = false;
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) behind |= sums[r][0] + sums[r][1] > T(1 << kSlack);
    if (kLooksAfterwards && !kReferenceIsMaximum && seldom(__any_sync(0xffffffffu, behind))) {
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
      if (kDropout) key_place = __shfl_xor_sync(0xffffffffu, key_place, 0);  // or the assembler keeps what was decided, all of it, for this
      make_weights<0, kSteps>(scale, sums);
    }
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) pair[r].sum += sums[r][0] + sums[r][1];
  }

  static __device__ __forceinline__ T highest_of_row(T x) {
    return across_row<Products::kRowLanes>(x, [](T a, T b) { return max_of(a, b); });
  }

  // Takes out of `seen` the scores of keys that their row may not see: of a thread's scores, in the order of their keys, there remain those
  // before an end and not before a beginning.
  static __device__ __forceinline__ void leave_out_unseen(uint32 (&seen)[Products::kRows], const KeyInterval& keys, int first_key) {
    const int block_row = recomputed(0);
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) {
      const int row = block_row + Products::row(r), own = first_key + Products::key(0);
      seen[r] &= before(keys.end(row) - own) & ~before(keys.begin(row) - own);
    }
  }

  // The bits of the scores whose keys, counted from this thread's first, are below `end`: two of every eight are its own.
  static __device__ __forceinline__ uint32 before(int end) {
    const uint32 ahead = max_of(end, 0), count = ahead / 8 * 2 + min_of(ahead % 8, 2u);
    return count < 32 ? (1u << count) - 1 : ~0u;
  }

  // Where this lane's part of an 8 x 32 piece of a streamed tile is, for load_matrices, whose 8 x 8 matrices are the accumulator's: those
  // of the keys from 32 `keys` on, and of the rows 8 r and following of a warp's.
  static __device__ __forceinline__ uint32 streamed(uint32 tile, int keys, int r) {
    const int lane = threadIdx.x % 32, row = Products::warp_row() + lane % 8, chunk = lane / 8 ^ lane % 8;
    return (tile + row * 2 * kBox + chunk * 16 ^ keys % 2 * 64) + keys / 2 * StreamedTile::kBoxBytes + r * 8 * 2 * kBox;
  }

  // The query tile's sums are complete: lse goes out. Gives what O is to be multiplied by: 0 for rows that saw no key, and for no others.
  __device__ __forceinline__ void close(const Params& params, const Task& task, T (&inverse)[Products::kRows]) {
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) {
      const int row = Products::row(r);
      pair[r].sum = across_row<Products::kRowLanes>(pair[r].sum, [](T a, T b) { return a + b; });
      const bool empty = pair[r].max == kLowest && pair[r].sum == T(0);  // and no NaN
      const bool has_weights = Rows::has_weights(pair[r].max);
      T factor = kDropout ? params.dropout.rescale : T(1);
      if (Variant::kHasSink) factor *= take_sink(pair[r], params.variant.sink(task.coordinates(params, row)));
      if (row < task.keys.rows && params.lse.data != nullptr && Products::key(0) == 0) {
        *task.row_of(params.lse, row) = pair[r].log_sum() * T(kLn2);
      }
      const bool is_number = pair[r].sum == pair[r].sum, fits = has_weights && pair[r].sum < T(1e37);
      inverse[r] = empty && is_number ? T(0) : fits ? factor * reciprocal(pair[r].sum) : nan<T>();
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

  // Stores from there the rows of this warp that exist, 16 bytes a lane: what a box of TMA has beyond a sequence's end is the next one's.
  static __device__ __forceinline__ void store_staged(const Params& params, const Task& task, uint32 o_smem) {
    constexpr int kBlocks = kHeadDimV / 8;
    const int top = Products::warp_row(), rows = min_of(task.keys.rows - top, int(Products::kWarpRows));
    __syncwarp();  // all lanes have left theirs
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < rows * kBlocks; i += 32) {
      const int row = top + i / kBlocks, block = i % kBlocks;
      if (8 * block >= params.head_dim_v) continue;
      const uint32 from = o_smem + block / 8 * OTile::kBoxBytes + row * 2 * kBox + (block % 8 ^ row % 8) * 16;
      uint32 x[4];
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
      store_16_bytes(task.row_of(params.out, row) + 8 * block, x);
    }
    __syncwarp();  // all lanes have read, before others are left there
  }

  __device__ __forceinline__ void store(const Params& params, const Task& task) const {
    const bool whole = params.head_dim_v >= kHeadDimV;
    const uint64 strides = params.out.row | (params.pack_shift > 0 ? params.out.head : 0);
    const uint64 alignment = reinterpret_cast<uint64>(task.row_of(params.out, 0)) | strides * sizeof(Output);
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) {
      const int row = Products::row(r);
      const bool exists = row < task.keys.rows;
      Output* out = task.row_of(params.out, row);
      if (sizeof(Output) == 2 && whole && alignment % 16 == 0) {
        store_blocks(out, o[r], exists);
      } else if (exists && whole && alignment % (2 * sizeof(Output)) == 0) {
        store_pairs(out, o[r]);
      } else if (exists) {
        Rows::store(out, o[r], params.head_dim_v);
      }
    }
  }

  // One instruction: the compiler, left alone, makes four of some.
  static __device__ __forceinline__ void store_16_bytes(Output* to, const uint32 (&x)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
  }

  // Of four blocks of 8 columns, each lane of a row has two columns; it gets one block whole. A transposition in two exchanges.
  static __device__ __forceinline__ void store_blocks(Output* row, const T (&o)[Products::kOutputs], bool exists) {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int c = 0; c < Products::kOutputs; c += 8) {
      uint32 block[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) block[i] = narrow_pair<Element>(o[c + 2 * i], o[c + 2 * i + 1]);
      transpose_quad(block);
      if (exists) store_16_bytes(row + 4 * c + 8 * lane, block);
    }
  }
};

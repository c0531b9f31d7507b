// FlashAttention forward for float32 on TF32 tensor cores, sm_80 and later.
//
// With kSplit every operand is a sum of two TF32 numbers and a product three: high high + high low + low high, which errs as float32
// does. Tensor cores cut off as they add, so their sums are kept short: every kRun elements of head_dim in S, every key tile in P V, they
// start from zero and join the long sum by an ordinary addition. Without kSplit it is plain TF32.
//
// Constants: those of tile_loop.cuh, kRowTiles, kMinBlocks, kSplit.
#if __CUDA_ARCH__ < 800
#error "TF32 needs sm_80"
#endif
#include "_attention/mma_layout.cuh"
#include "_attention/tile_loop.cuh"
#include "device/mma.cuh"

template <int N> struct SplitFragment {
  uint32 high[N], low[N];

  __device__ __forceinline__ void set(int i, float x) { split_tf32(high[i], low[i], x); }

  // ldmatrix brings the B fragments of two neighbouring products at once.
  __device__ __forceinline__ SplitFragment<2> half(int i) const {
    return {{high[2 * i], high[2 * i + 1]}, {low[2 * i], low[2 * i + 1]}};
  }
};

// Elements of head_dim that the tensor cores sum before the sum joins S in float32 arithmetic.
constexpr int kRun = 32;

struct Tf32Products : MmaLayout {
  using T = float;
  using QTile = SharedTile<T, kBlockM, kHeadDim>;
  using KTile = SharedTile<T, kBlockN, kHeadDim>;
  using VTile = SharedTile<T, kBlockN, kHeadDimV>;
  static_assert(Grid::kWholePanels<T>, "a group's columns must begin with a panel");

  static __device__ __forceinline__ void scores(T (&s)[kRows][kScores], QTile q_smem, KTile k_smem) {
    const uint32 q_lane = q_smem.at(warp_row() + lane() % 16, lane() / 16);
    const uint32 k_lane = k_smem.at(lane() / 16 * 8 + lane() % 8, lane() / 8 % 2);
#pragma unroll 2
    for (int first = 0; first < kHeadDim; first += kRun) {
      T run[kRows][kScores] = {};
#pragma unroll
      for (int d = first; d < first + kRun; d += 8) {
        SplitFragment<4> q_frag[kRowTiles];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) q_frag[m] = load_split(QTile::moved(q_lane, m * 16, d / 4));
#pragma unroll
        for (int n = 0; n < kBlockN; n += 16) {
          const SplitFragment<4> k_frag = load_split(KTile::moved(k_lane, n, d / 4));
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            multiply(run, m, n / 4, q_frag[m], k_frag.half(0));
            multiply(run, m, n / 4 + 2, q_frag[m], k_frag.half(1));
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < kScores; ++c) s[r][c] += run[r][c];
    }
    if (kSplit && any_nan(s)) scores_one_by_one(s, q_smem, k_smem);
  }

  static __device__ __forceinline__ bool any_nan(const T (&s)[kRows][kScores]) {
    bool found = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kScores; ++c) found |= s[r][c] != s[r][c];
    return __any_sync(0xffffffffu, found);
  }

  // An infinity has no two parts: infinity less itself is a NaN where float32 has an infinite score, or none. Such tiles are done again.
  static __device__ __forceinline__ void scores_one_by_one(T (&s)[kRows][kScores], QTile q_smem, KTile k_smem) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kScores; ++c) {
        T sum = 0;
#pragma unroll 1
        for (int d = 0; d < kHeadDim; ++d) sum += load(q_smem.element(row(r), d)) * load(k_smem.element(key(c), d));
        s[r][c] = sum;
      }
  }

  // The product counts keys in another order: the accumulator's columns 2t and 2t + 1 of S are k = t and t + 4, so that P needs no
  // shuffle, and V's rows are read in that order.
  static __device__ __forceinline__ void weigh(T (&o)[kRows][kOutputs], const T (&p)[kRows][kScores], VTile v_smem) {
    const int g = lane() / 4, t = lane() % 4;
    const int column = Grid::first_column() + g;
    const uint32 v_lane[2] = {v_smem.element(2 * t, column), v_smem.element(2 * t + 1, column)};
    SplitFragment<4> p_frag[kRowTiles][kBlockN / 8];
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) p_frag[m][n].set(i, p[2 * m + i % 2][2 * n + i / 2]);
#pragma unroll
    for (int d = 0; d < Grid::kColumns; d += 8) {
      T tile[kRows][2] = {};
#pragma unroll
      for (int n = 0; n < kBlockN / 8; ++n) {
        SplitFragment<2> v_frag;
#pragma unroll
        for (int i = 0; i < 2; ++i) v_frag.set(i, load(VTile::moved(v_lane[i], 8 * n, d / 4)));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) multiply(tile, m, 0, p_frag[m][n], v_frag);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i) o[r][d / 4 + i] += tile[r][i];
    }
  }

  // The small terms first: they would be lost beside the large one.
  template <int kColumns>
  static __device__ __forceinline__ void multiply(T (&to)[kRows][kColumns], int m, int c, const SplitFragment<4>& a,
                                                  const SplitFragment<2>& b) {
    T &c0 = to[2 * m][c], &c1 = to[2 * m][c + 1], &c2 = to[2 * m + 1][c], &c3 = to[2 * m + 1][c + 1];
    if (kSplit) {
      mma_16x8x8(c0, c1, c2, c3, a.low, b.high[0], b.high[1]);
      mma_16x8x8(c0, c1, c2, c3, a.high, b.low[0], b.low[1]);
    }
    mma_16x8x8(c0, c1, c2, c3, a.high, b.high[0], b.high[1]);
  }

  static __device__ __forceinline__ SplitFragment<4> load_split(uint32 address) {
    uint32 words[4];
    load_matrices(words, address);
    SplitFragment<4> fragment;
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment.set(i, __uint_as_float(words[i]));
    return fragment;
  }

  static __device__ __forceinline__ T load(uint32 address) {
    T x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
    return x;
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
attention_forward(const __grid_constant__ Params params) {
  attend<Tf32Products>(params);
}

// FlashAttention forward for float32 on TF32 tensor cores, sm_80 and later.
//
// With kSplit every operand is a sum of two TF32 numbers and a product three: high high + high low + low high, which errs as float32
// does. Tensor cores cut off as they add, so a tile's P V starts from zero and joins O by one FMA. Without kSplit it is plain TF32.
//
// Constants: Element, Output, kHeadDim, kHeadDimV, kBlockM, kBlockN, kThreads, kStages, kRowTiles, kMinBlocks, kSplit.
#include "_attention/mma_layout.cuh"
#include "_attention/tile_loop.cuh"
#include "device/mma.cuh"

template <int N> struct SplitFragment {
  uint32 high[N], low[N];

  __device__ __forceinline__ void set(int i, float x) { split_tf32(high[i], low[i], x); }
};

struct Tf32Products : MmaLayout {
  using T = float;
  using QTile = SharedTile<T, kBlockM, kHeadDim>;
  using KTile = SharedTile<T, kBlockN, kHeadDim>;
  using VTile = SharedTile<T, kBlockN, kHeadDimV>;

  static __device__ __forceinline__ void scores(T (&s)[kRows][kScores], QTile q_smem, KTile k_smem) {
    const int q_row = warp_row() + lane() % 16, q_half = lane() / 16;
    const int k_row = lane() / 16 * 8 + lane() % 8, k_half = lane() / 8 % 2;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kScores; ++c) s[r][c] = 0;
#pragma unroll kUnrollD
    for (int d = 0; d < kHeadDim; d += 8) {
      SplitFragment<4> q_frag[kRowTiles];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) q_frag[m] = load_split(q_smem.at(q_row + m * 16, d / 4 + q_half));
#pragma unroll
      for (int n = 0; n < kBlockN; n += 16) {
        const SplitFragment<4> k_frag = load_split(k_smem.at(k_row + n, d / 4 + k_half));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int c = n / 4 + 2 * half;
            multiply(s[2 * m][c], s[2 * m][c + 1], s[2 * m + 1][c], s[2 * m + 1][c + 1], q_frag[m],
                     {{k_frag.high[2 * half], k_frag.high[2 * half + 1]}, {k_frag.low[2 * half], k_frag.low[2 * half + 1]}});
          }
      }
    }
  }

  // The product counts keys in another order: the accumulator's columns 2t and 2t + 1 of S are k = t and t + 4, so that P needs no
  // shuffle, and V's rows are read in that order.
  static __device__ __forceinline__ void weigh(T (&o)[kRows][kOutputs], const T (&p)[kRows][kScores], VTile v_smem) {
    SplitFragment<4> p_frag[kRowTiles][kBlockN / 8];
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) p_frag[m][n].set(i, p[2 * m + i % 2][2 * n + i / 2]);
#pragma unroll
    for (int d = 0; d < kHeadDimV; d += 8) {
      T tile[kRowTiles][4] = {};
#pragma unroll
      for (int n = 0; n < kBlockN / 8; ++n) {
        SplitFragment<2> v_frag;
#pragma unroll
        for (int i = 0; i < 2; ++i) v_frag.set(i, load(v_smem.element(8 * n + 2 * (lane() % 4) + i, d + lane() / 4)));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
          multiply(tile[m][0], tile[m][1], tile[m][2], tile[m][3], p_frag[m][n], v_frag);
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[2 * m + i / 2][d / 4 + i % 2] += tile[m][i];
    }
  }

  // The small terms first: they would be lost beside the large one.
  static __device__ __forceinline__ void multiply(T& c0, T& c1, T& c2, T& c3, const SplitFragment<4>& a,
                                                  const SplitFragment<2>& b) {
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

// FlashAttention forward for float16 and bfloat16 on mma.sync, sm_75 and later.
//
// Constants: those of tile_loop.cuh, kRowTiles, kMinBlocks.
#include "_attention/mma_layout.cuh"
#include "_attention/tile_loop.cuh"
#include "device/mma.cuh"

struct HalfProducts : MmaLayout {
  using T = float;
  using QTile = SharedTile<Element, kBlockM, kHeadDim>;
  using KTile = SharedTile<Element, kBlockN, kHeadDim>;
  using VTile = SharedTile<Element, kBlockN, kHeadDimV>;
  static_assert(Grid::kWholePanels<Element>, "a group's columns must begin with a panel");

  static __device__ __forceinline__ void scores(T (&s)[kRows][kScores], QTile q_smem, KTile k_smem) {
    const uint32 q_lane = q_smem.at(warp_row() + lane() % 16, lane() / 16);
    const uint32 k_lane = k_smem.at(lane() / 16 * 8 + lane() % 8, lane() / 8 % 2);
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16) {
      uint32 q_frag[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) load_matrices(q_frag[m], QTile::moved(q_lane, m * 16, d / 8));
#pragma unroll
      for (int n = 0; n < kBlockN; n += 16) {
        uint32 k_frag[4];
        load_matrices(k_frag, KTile::moved(k_lane, n, d / 8));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply(s, m, n / 4, q_frag[m], k_frag[0], k_frag[1]);
          multiply(s, m, n / 4 + 2, q_frag[m], k_frag[2], k_frag[3]);
        }
      }
    }
  }

  // P stays in registers: two neighbouring accumulator blocks of S are, rounded and paired, one A fragment.
  static __device__ __forceinline__ void weigh(T (&o)[kRows][kOutputs], const T (&p)[kRows][kScores], VTile v_smem) {
    const uint32 v_lane = v_smem.at(lane() % 16, Grid::first_column() / 8 + lane() / 16);
#pragma unroll
    for (int n = 0; n < kBlockN; n += 16) {
      uint32 p_frag[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = 2 * m + i % 2, c = n / 4 + i / 2 * 2;
          p_frag[m][i] = narrow_pair<Element>(p[r][c], p[r][c + 1]);
        }
#pragma unroll
      for (int d = 0; d < Grid::kColumns; d += 16) {
        uint32 v_frag[4];
        load_matrices_transposed(v_frag, VTile::moved(v_lane, n, d / 8));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply(o, m, d / 4, p_frag[m], v_frag[0], v_frag[1]);
          multiply(o, m, d / 4 + 2, p_frag[m], v_frag[2], v_frag[3]);
        }
      }
    }
  }

  template <int kColumns>
  static __device__ __forceinline__ void multiply(T (&to)[kRows][kColumns], int m, int c, const uint32 (&a)[4],
                                                  uint32 b0, uint32 b1) {
    mma_16x8x16<Element>(to[2 * m][c], to[2 * m][c + 1], to[2 * m + 1][c], to[2 * m + 1][c + 1], a, b0, b1);
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
attention_forward(const __grid_constant__ Params params) {
  attend<HalfProducts>(params);
}

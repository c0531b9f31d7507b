// FlashAttention forward for float64 on FP64 tensor cores (DMMA): sm_80, sm_90, sm_100.
//
// Products count in an order of their own, which lets a thread read its two neighbours 2t and 2t + 1 at once and use them as
// k = t and t + 4: head_dim for S = Q K^T, keys for P V, where P then needs no shuffle.
//
// Constants: those of tile_loop.cuh, kRowTiles, kMinBlocks.
#if __CUDA_ARCH__ < 800
#error "DMMA needs sm_80"
#endif
#include "_attention/mma_layout.cuh"
#include "_attention/tile_loop.cuh"
#include "device/mma.cuh"

struct DoubleProducts : MmaLayout {
  using T = double;
  using QTile = SharedTile<T, kBlockM, kHeadDim, Access::kRowPairs>;
  using KTile = SharedTile<T, kBlockN, kHeadDim, Access::kRowPairs>;
  using VTile = SharedTile<T, kBlockN, kHeadDimV>;
  static_assert(Grid::kWholePanels<T>, "a group's columns must begin with a panel");

  static __device__ __forceinline__ void scores(T (&s)[kRows][kScores], QTile q_smem, KTile k_smem) {
    const int g = lane() / 4, t = lane() % 4;
    const uint32 q_lane = q_smem.at(warp_row() + g, t), k_lane = k_smem.at(g, t);
#pragma unroll 4
    for (int d = 0; d < kHeadDim; d += 8) {
      T q_frag[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        load_pair(q_frag[m][0], q_frag[m][2], QTile::moved(q_lane, m * 16, d / 2));
        load_pair(q_frag[m][1], q_frag[m][3], QTile::moved(q_lane, m * 16 + 8, d / 2));
      }
#pragma unroll
      for (int n = 0; n < kBlockN / 8; ++n) {
        T k_frag[2];
        load_pair(k_frag[0], k_frag[1], KTile::moved(k_lane, 8 * n, d / 2));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) multiply(s, m, 2 * n, q_frag[m], k_frag);
      }
    }
  }

  static __device__ __forceinline__ void weigh(T (&o)[kRows][kOutputs], const T (&p)[kRows][kScores], VTile v_smem) {
    const int g = lane() / 4, t = lane() % 4;
    const int column = Grid::first_column() + g;
    const uint32 v_lane[2] = {v_smem.element(2 * t, column), v_smem.element(2 * t + 1, column)};
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n) {
      T p_frag[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) p_frag[m][i] = p[2 * m + i % 2][2 * n + i / 2];
#pragma unroll
      for (int d = 0; d < Grid::kColumns; d += 8) {
        const T v_frag[2] = {load(VTile::moved(v_lane[0], 8 * n, d / 2)), load(VTile::moved(v_lane[1], 8 * n, d / 2))};
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) multiply(o, m, d / 4, p_frag[m], v_frag);
      }
    }
  }

  template <int kColumns>
  static __device__ __forceinline__ void multiply(T (&to)[kRows][kColumns], int m, int c, const T (&a)[4],
                                                  const T (&b)[2]) {
    mma_16x8x8(to[2 * m][c], to[2 * m][c + 1], to[2 * m + 1][c], to[2 * m + 1][c + 1], a, b[0], b[1]);
  }

  static __device__ __forceinline__ T load(uint32 address) {
    T x;
    asm volatile("ld.shared.f64 %0, [%1];" : "=d"(x) : "r"(address) : "memory");
    return x;
  }

  static __device__ __forceinline__ void load_pair(T& first, T& second, uint32 address) {
    asm volatile("ld.shared.v2.f64 {%0, %1}, [%2];" : "=d"(first), "=d"(second) : "r"(address) : "memory");
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
attention_forward(const __grid_constant__ Params params) {
  attend<DoubleProducts>(params);
}

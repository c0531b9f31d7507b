// Where a thread's elements lie when a warp holds kRowTiles * 16 rows in mma.sync accumulators: see device/mma.cuh.
#include "_attention/warp_grid.cuh"

struct MmaLayout {
  static constexpr int kRows = 2 * kRowTiles;
  static constexpr int kScores = kBlockN / 4;
  static constexpr int kOutputs = WarpGrid<16 * kRowTiles>::kColumns / 4;
  static constexpr int kRowLanes = 4;
  static constexpr int kWarpRows = 16 * kRowTiles;
  using Grid = WarpGrid<kWarpRows>;

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp_row() { return Grid::first_row(threadIdx.x); }
  static __device__ __forceinline__ int row(int r) { return warp_row() + r / 2 * 16 + r % 2 * 8 + lane() / 4; }
  static __device__ __forceinline__ int key(int c) { return c / 2 * 8 + lane() % 4 * 2 + c % 2; }
  static __device__ __forceinline__ int output(int c) { return Grid::first_column() + key(c); }
};

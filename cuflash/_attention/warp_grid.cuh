// How the warps of a block share out its kBlockM x kHeadDimV tile of the output.
//
// A warp has kWarpRows rows. Where there are more warps than the rows need, they form kParts groups that share all rows, and each group
// has its part of the columns: O of wide heads does not fit the registers of one. Every group computes all scores.
#include "device/types.cuh"

template <int kWarpRows> struct WarpGrid {
  static constexpr int kRowWarps = kBlockM / kWarpRows;
  static constexpr int kParts = kThreads / 32 / kRowWarps;
  static constexpr int kColumns = kHeadDimV / kParts;
  static_assert(kRowWarps * kWarpRows == kBlockM && 32 * kRowWarps * kParts == kThreads, "the warps must cover the query tile");
  static_assert(kParts * kColumns == kHeadDimV, "the groups must cover the columns");

  template <typename Index> static __device__ __forceinline__ int first_row(Index thread) {
    return (kParts == 1 ? thread / 32 : thread / 32 % kRowWarps) * kWarpRows;
  }
  static __device__ __forceinline__ int first_column() {
    return kParts == 1 ? 0 : threadIdx.x / 32 / kRowWarps * kColumns;
  }

  // Columns of a tile of T that is swizzled in panels of 128 bytes: a group's must begin with one.
  template <typename T> static constexpr bool kWholePanels = kParts == 1 || kColumns * sizeof(T) % 128 == 0;
};

// The products on the ordinary FMA units, in T = float or double: for GPUs whose tensor cores cannot do better at full precision.
//
// A warp holds 4 * kThreadRows query rows. Lane l works on rows l / 8 + 4 r; its keys are l % 8 + 8 c, its outputs whole 16-byte chunks.
#include "_attention/tile_loop.cuh"

template <typename Number> struct SimtProducts {
  using T = Number;
  static constexpr int kChunk = 16 / sizeof(T);
  static constexpr int kRows = kThreadRows;
  static constexpr int kScores = kBlockN / 8;
  static constexpr int kOutputs = WarpGrid<4 * kThreadRows>::kColumns / 8;
  static constexpr int kRowLanes = 8;
  static constexpr int kWarpRows = 4 * kThreadRows;
  using Grid = WarpGrid<kWarpRows>;
  static_assert(Grid::kColumns % (8 * kChunk) == 0, "a thread's outputs must be whole chunks");

  using QTile = SharedTile<T, kBlockM, kHeadDim>;
  using KTile = SharedTile<T, kBlockN, kHeadDim>;
  using VTile = SharedTile<T, kBlockN, kHeadDimV>;
  using Chunk = Vector<T, kChunk>;

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int row(int r) { return Grid::first_row(threadIdx.x) + lane() / 8 + 4 * r; }
  static __device__ __forceinline__ int key(int c) { return lane() % 8 + 8 * c; }
  static __device__ __forceinline__ int output(int c) { return Grid::first_column() + (c / kChunk * 8 + lane() % 8) * kChunk + c % kChunk; }

  static __device__ __forceinline__ void scores(T (&s)[kRows][kScores], QTile q_smem, KTile k_smem) {
#pragma unroll 1
    for (int chunk = 0; chunk < kHeadDim / kChunk; ++chunk) {
      Chunk q_frag[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) q_frag[r] = load(q_smem.at(row(r), chunk));
#pragma unroll
      for (int c = 0; c < kScores; ++c) {
        const Chunk k_frag = load(k_smem.at(key(c), chunk));
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int i = 0; i < kChunk; ++i) s[r][c] += q_frag[r].at[i] * k_frag.at[i];
      }
    }
  }

  // A key's probabilities lie with one lane of each row: it hands them to the row's other lanes.
  static __device__ __forceinline__ void weigh(T (&o)[kRows][kOutputs], const T (&p)[kRows][kScores], VTile v_smem) {
#pragma unroll
    for (int c = 0; c < kScores; ++c)
#pragma unroll 1
      for (int owner = 0; owner < 8; ++owner) {
        T p_frag[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) p_frag[r] = __shfl_sync(0xffffffffu, p[r][c], owner, 8);
#pragma unroll
        for (int n = 0; n < kOutputs; n += kChunk) {
          const Chunk v_frag = load(v_smem.at(8 * c + owner, Grid::first_column() / kChunk + n / kChunk * 8 + lane() % 8));
#pragma unroll
          for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int i = 0; i < kChunk; ++i) o[r][n + i] += p_frag[r] * v_frag.at[i];
        }
      }
  }

  static __device__ __forceinline__ Chunk load(uint32 address) {
    Chunk chunk;
    uint32* word = reinterpret_cast<uint32*>(&chunk);
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) : "r"(address) : "memory");
    return chunk;
  }
};

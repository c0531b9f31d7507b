// Tiles in shared memory: where element (row, column) lies, and how a block fills one from device memory.
#include "device/types.cuh"

__device__ __forceinline__ uint32 shared_address(const void* p) {
  return uint32(__cvta_generic_to_shared(p));
}

// cp.async, PTX ISA 9.7.9.25.3: 16 bytes from device to shared memory past the registers. Bytes from `valid` on become 0
// and are not read. sm_75 has no such instruction: copy_chunk below goes through registers there.
__device__ __forceinline__ void copy_async_16(uint32 to, const void* from, int valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
#endif
}

// Waits for all of this thread's copies; other threads see them after the next __syncthreads().
__device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// How a tile's readers walk over it, which decides the permutation that keeps them off one another's banks.
enum class Access {
  kColumns,  // eight consecutive rows of one 16-byte chunk (ldmatrix), or every other row of two chunks
  kRowPairs  // two consecutive rows of four chunks
};

// A [kRows][kColumns] tile of T. Rows are cut into panels of 128 bytes (64 where 128 does not divide them); a panel holds its rows
// one after another, and the 16-byte chunks of a row are permuted by an XOR with the row's phase.
template <typename T, int kRows, int kColumns, Access kAccess = Access::kColumns>
struct SharedTile {
  static constexpr int kChunk = 16 / sizeof(T);  // elements
  static constexpr int kPanelRow = kColumns * sizeof(T) % 128 == 0 ? 128 : 64;  // bytes
  static constexpr int kChunks = kPanelRow / 16;
  static constexpr int kPanels = kColumns * sizeof(T) / kPanelRow;
  static constexpr int kPanelBytes = kRows * kPanelRow;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static_assert(kColumns * sizeof(T) % 64 == 0, "a row must fill panels of 64 bytes");
  static_assert(kPanelRow == 128 || kAccess == Access::kColumns, "paired rows need panels of 128 bytes");

  uint32 base;

  __device__ __forceinline__ explicit SharedTile(uint32 address) : base(address) {}

  static __device__ __forceinline__ int phase(int row) {
    if (kPanelRow == 64) return (row >> 1) & 3;
    return kAccess == Access::kColumns ? row & 7 : (row & 1) << 2 | (row >> 1) & 3;
  }

  // The address of a 16-byte chunk; the unrolled callers' constants fold into the instruction's offset.
  __device__ __forceinline__ uint32 at(int row, int chunk) const {
    return base + chunk / kChunks * kPanelBytes + row * kPanelRow + ((chunk % kChunks ^ phase(row)) << 4);
  }

  // From the address of a chunk to the one `rows` below and `chunks` to its right. `rows` must be a multiple of 8, which leaves the phase
  // as it is, and `chunks` may set only bits that are 0 in the chunk's number: then one XOR and a constant do it.
  static __device__ __forceinline__ uint32 moved(uint32 address, int rows, int chunks) {
    return (address ^ chunks % kChunks << 4) + chunks / kChunks * kPanelBytes + rows * kPanelRow;
  }

  // Element (row, column).
  __device__ __forceinline__ uint32 element(int row, int column) const {
    return at(row, column / kChunk) + column % kChunk * sizeof(T);
  }
};

// One chunk of a tile; elements from `valid` on become 0. The tile's type may be wider than the array's.
template <typename Stored, typename Element>
__device__ __forceinline__ void copy_chunk(uint32 to, const Element* from, int valid) {
  constexpr int kChunk = 16 / sizeof(Stored);
  constexpr bool kSame = sizeof(Stored) == sizeof(Element);
  if (kSame && __CUDA_ARCH__ >= 800) {
    copy_async_16(to, from, valid * int(sizeof(Element)));
    return;
  }
  Vector<Stored, kChunk> chunk;
  if constexpr (kSame) {
    if (valid == kChunk) chunk = *reinterpret_cast<const Vector<Stored, kChunk>*>(from);
    else
#pragma unroll
      for (int i = 0; i < kChunk; ++i) chunk.at[i] = i < valid ? from[i] : Stored{};
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) chunk.at[i] = i < valid ? Stored(widen(from[i])) : Stored{};
  }
  const uint32* word = reinterpret_cast<const uint32*>(&chunk);
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
               ::"r"(to), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]) : "memory");
}

// The chunks of a tile that fall to this thread, every kThreads-th: one column of chunks in each panel. `from` is its first.
template <int kThreads, bool kWhole, typename Element, typename T, int kRows, int kColumns, Access kAccess>
__device__ __forceinline__ void fill_chunks(SharedTile<T, kRows, kColumns, kAccess> tile, const Element* from,
                                            int64 row_stride, int columns, int first, int begin, int end, int thread) {
  using Tile = SharedTile<T, kRows, kColumns, kAccess>;
  constexpr int kRowStep = kThreads / Tile::kChunks;
  static_assert(kRowStep % 8 == 0, "a thread's rows must share one phase");
  const int row = thread / Tile::kChunks, chunk = thread % Tile::kChunks;
  const uint32 to = tile.at(row, chunk);
#pragma unroll
  for (int step = 0; step < kRows; step += kRowStep, from += kRowStep * row_stride) {
    if (kRows % kRowStep != 0 && row + step >= kRows) break;
    const bool inside = first + row + step >= begin && first + row + step < end;
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel) {
      const int column = (panel * Tile::kChunks + chunk) * Tile::kChunk;
      const int valid = inside ? min_of(max_of(columns - column, 0), int(Tile::kChunk)) : 0;
      copy_chunk<T>(to + panel * Tile::kPanelBytes + step * Tile::kPanelRow,
                    from + panel * Tile::kChunks * Tile::kChunk, kWhole ? int(Tile::kChunk) : valid);
    }
  }
}

// Fills a tile with rows [first, first + kRows) of an array. Rows outside [begin, end) and columns from `columns` on become 0
// and are not read: what no query may attend never meets arithmetic.
template <int kThreads, typename Element, typename T, int kRows, int kColumns, Access kAccess>
__device__ __forceinline__ void fill(SharedTile<T, kRows, kColumns, kAccess> tile, const Element* array,
                                     int64 row_stride, int columns, int first, int begin, int end) {
  using Tile = SharedTile<T, kRows, kColumns, kAccess>;
  const int thread = recomputed(threadIdx.x);
  const Element* from =
      array + (first + thread / Tile::kChunks) * row_stride + thread % Tile::kChunks * Tile::kChunk;
  if (first >= begin && first + kRows <= end && columns >= kColumns) {
    fill_chunks<kThreads, true>(tile, from, row_stride, columns, first, begin, end, thread);
  } else {
    fill_chunks<kThreads, false>(tile, from, row_stride, columns, first, begin, end, thread);
  }
}

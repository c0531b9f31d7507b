// Which weights dropout drops: a function of the seed and of a weight's place, so that every tiling, every engine and a backward pass
// find the same ones, and nothing is stored. dropout.py says the same in NumPy.
//
// One call of Philox gives eight numbers of 16 bits, for the eight places that a lane (g, t) of a warp has of a 16 x 16 block of an
// accumulator of mma.sync: rows g and g + 8, keys 2t, 2t + 1, 2t + 8 and 2t + 9. A weight is dropped where its number is below a threshold.
#include "device/philox.cuh"

constexpr int kDropoutRounds = 7;

// The weights of one head.
struct Dropping {
  uint64 seed;
  uint32 threshold;  // of 2^16
  uint32 head, entry;

  // Where the calls for a row and for a key stand, beyond which 8 (4) more is the next block's.
  static __device__ __forceinline__ uint32 row_place(uint32 row) { return row / 16 * 8 + row % 8; }
  static __device__ __forceinline__ uint32 key_place(uint32 key) { return key / 16 * 4 + key % 8 / 2; }

  // The numbers of a call, two in each word, that of the even key in the lower half.
  __device__ __forceinline__ Words draw(uint32 row_place, uint32 key_place) const {
    return philox<kDropoutRounds>({row_place, key_place, head, entry}, seed);
  }
  __device__ __forceinline__ bool stays(uint32 word, bool odd) const {
    return (odd ? word : word << 16) >= threshold << 16;  // what stands below the upper half decides nothing
  }

  // Of a lane's weights in two rows, 8 apart, those from c on, which are of one call: what is dropped becomes 0.
  template <typename T, int N>
  __device__ __forceinline__ void drop(T (&upper)[N], T (&lower)[N], int c, uint32 row_place, uint32 key_place) const {
    const Words words = draw(row_place, key_place);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!stays(words.at[i / 2], i % 2)) upper[c + i] = 0;
      if (!stays(words.at[2 + i / 2], i % 2)) lower[c + i] = 0;
    }
  }

  // One weight by itself, for threads that hold others.
  __device__ __forceinline__ bool keeps(uint32 row, uint32 key) const {
    const Words words = draw(row_place(row), key_place(key));
    const uint32 upper = key & 8 ? words.at[1] : words.at[0], lower = key & 8 ? words.at[3] : words.at[2];
    return stays(row & 8 ? lower : upper, key & 1);
  }
};

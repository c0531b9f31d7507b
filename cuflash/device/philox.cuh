// Counter-based random numbers: a function of a key and a counter, so that any number of a sequence is there at once.
#include "device/types.cuh"

struct Words { uint32 at[4]; };

// All 64 bits of a product, in one instruction. PTX ISA, integer arithmetic: mul.
__device__ __forceinline__ uint64 whole_product(uint32 a, uint32 b) {
  uint64 product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}

// Philox4x32: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. 7 rounds are the fewest that pass all
// of their tests, 10 leave a margin.
template <int kRounds = 10> __device__ __forceinline__ Words philox(Words counter, uint64 key) {
  uint32 first = uint32(key), second = uint32(key >> 32);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const uint64 even = whole_product(counter.at[0], 0xD2511F53u);
    const uint64 odd = whole_product(counter.at[2], 0xCD9E8D57u);
    counter = {uint32(odd >> 32) ^ counter.at[1] ^ first, uint32(odd),
               uint32(even >> 32) ^ counter.at[3] ^ second, uint32(even)};
    first += 0x9E3779B9u;
    second += 0xBB67AE85u;
  }
  return counter;
}

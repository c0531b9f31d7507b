// Blocks of a cluster: neighbours on the grid that run at the same time and reach one another's shared memory (sm_90 and later).
// PTX ISA, "Parallel Synchronization and Communication Instructions: barrier.cluster", and "Data Movement: mapa".
#include "device/types.cuh"

// Kernels that may run as clusters say CLUSTER_OF(kCluster) between __global__ and their name.
#if __CUDA_ARCH__ >= 900
#define CLUSTER_OF(blocks) __cluster_dims__(blocks, 1, 1)
#else
#define CLUSTER_OF(blocks)
#endif

// Releases what this thread wrote to any block's shared memory; `cluster_wait` acquires what all threads released.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Writes a value to the place in another block's shared memory where `mine` is in this block's.
template <typename T> __device__ __forceinline__ void store_to_block(T* mine, int block, T value) {
#if __CUDA_ARCH__ >= 900
  static_assert(sizeof(T) % 4 == 0, "copied word by word");
  const uint32 here = uint32(__cvta_generic_to_shared(mine));
  uint32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(block));
  const uint32* words = reinterpret_cast<const uint32*>(&value);
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 4); ++i) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there + 4 * i), "r"(words[i]) : "memory");
  }
#endif
}

// Copies from global to shared memory that run beside the thread (sm_80 and later).
// PTX ISA, "Data Movement and Conversion Instructions: cp.async".
#include "device/types.cuh"

// 16 bytes, both addresses multiples of 16; past the first-level cache, for what is read once.
__device__ __forceinline__ void copy_async(void* smem, const void* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32(__cvta_generic_to_shared(smem))), "l"(from)
               : "memory");
#else
  *static_cast<uint4*>(smem) = *static_cast<const uint4*>(from);
#endif
}

// Closes a group of this thread's copies; a group may be empty.
__device__ __forceinline__ void close_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the latest kGroups groups of this thread are here; only this thread may then read them.
template <int kGroups> __device__ __forceinline__ void wait_for_groups() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

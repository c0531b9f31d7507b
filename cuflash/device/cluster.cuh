// Blocks of a cluster: neighbours on the grid that run at the same time and reach one another's shared memory (sm_90 and later).
// PTX ISA, "Parallel Synchronization and Communication Instructions": barrier.cluster and mbarrier; "Data Movement": mapa, st.async.
#include "device/types.cuh"

__device__ __forceinline__ uint32 shared_address(const void* smem) { return uint32(__cvta_generic_to_shared(smem)); }

// Of all threads of a cluster. An arrival waits for every store that the thread has made, to global memory too: for the
// beginning of a kernel only.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tbarrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// In shared memory: tells the threads of a block that what other blocks send has come.
struct Mailbox {
  uint64 barrier;

  __device__ __forceinline__ void init() {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(&barrier)) : "memory");
  }

  // Said by one thread, before or after the first bytes have come.
  __device__ __forceinline__ void expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes) : "memory");
  }

  // Waits until all that was expected has come.
  __device__ __forceinline__ void wait() {
    asm volatile(
        "{\n\t.reg .pred done;\n"
        "again:\n\tmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n\t"
        "@!done bra again;\n\t}" ::"r"(shared_address(&barrier))
        : "memory");
  }
};

// Writes a value to the place in another block's shared memory where `mine` is in this block's, and tells its mailbox.
template <typename T> __device__ __forceinline__ void send(const T& value, T* mine, Mailbox* mailbox, int block) {
  static_assert(sizeof(T) % 4 == 0, "sent word by word");
  uint32 to, told;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(mine)), "r"(block));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(told) : "r"(shared_address(mailbox)), "r"(block));
  const uint32* words = reinterpret_cast<const uint32*>(&value);
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 4); ++i) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to + 4 * i), "r"(words[i]),
                 "r"(told)
                 : "memory");
  }
}

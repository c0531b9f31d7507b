// Tiles that a copy engine brings from device memory to shared memory by itself, and the barriers that tell of their arrival (sm_90).
// PTX ISA, "Data Movement and Conversion Instructions": cp.async.bulk.tensor; "Parallel Synchronization": mbarrier.
#include "device/types.cuh"

// What the host says of an array: its address, sizes, strides and tile. Up to five axes, the first of neighbours.
struct alignas(64) TensorMap { uint64 words[16]; };

// In shared memory. Phases are numbered from 0; one ends when all arrivals and all announced bytes have come.
struct Barrier {
  uint64 state;

  __device__ __forceinline__ uint32 address() const { return uint32(__cvta_generic_to_shared(this)); }

  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals) : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
  }
  // An arrival that announces bytes.
  __device__ __forceinline__ void expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
  }
  // Until phase `number` has ended; the one before 0 has.
  __device__ __forceinline__ void wait(uint32 number) const {
    asm volatile(
        "{\n\t.reg .pred done;\n"
        "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
        "@!done bra again;\n\t}" ::"r"(address()), "r"(number & 1)
        : "memory");
  }
};

// Has barriers known to the copy engine. By the thread that made them; the others learn of them by a __syncthreads.
__device__ __forceinline__ void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Has the copy engine and the tensor cores see what this thread has written to shared memory.
__device__ __forceinline__ void show_written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Has a map at hand before the first tile is asked for.
__device__ __forceinline__ void prefetch(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// Starts bringing the tile at these coordinates; zeros come for what is outside of the array.
__device__ __forceinline__ void bring(uint32 smem, const TensorMap& map, Barrier& barrier, int x0, int x1, int x2, int x3, int x4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(smem),
      "l"(&map), "r"(barrier.address()), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4)
      : "memory");
}

// Starts storing a tile from shared memory, without what is outside of the array. Stores that this thread has started since are one group.
__device__ __forceinline__ void send(const TensorMap& map, uint32 smem, int x0, int x1, int x2, int x3, int x4) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map), "r"(smem),
               "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4)
               : "memory");
}
__device__ __forceinline__ void stores_end() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all groups of this thread have been read from shared memory.
__device__ __forceinline__ void stores_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Moves registers between the warpgroups of a block, whose sum stays what the kernel was launched with.
template <int kRegisters> __device__ __forceinline__ void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters> __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

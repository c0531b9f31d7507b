// Products of a warpgroup (128 threads) on Hopper: D += A B, D of 64 x N in registers, started here and awaited later.
// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions": wgmma.mma_async, its register fragments and matrix descriptors.
//
// A thread's accumulators lie as in mma.sync's 16-row blocks, a warp below another: d[r][c] is row lane / 4 + 8 r of the warp's
// rows and column c / 2 * 8 + lane % 4 * 2 + c % 2 (_attention/mma_layout.cuh).
#include "device/types.cuh"

// Before the first product that reads registers written since, or writes others than the product before.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes a group of products; `products_wait<n>` waits until at most n groups are under way.
__device__ __forceinline__ void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kGroups> __device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// The block's barriers, of which there are 16: 0 for all threads, and two for each of up to four warpgroups.
constexpr int kMeeting = 1, kLine = 5;

// Until all of the block have come here, on whatever way.
__device__ __forceinline__ void sync_block() { asm volatile("bar.sync 0;" ::: "memory"); }
// Until all of a warpgroup have come here.
__device__ __forceinline__ void sync_warpgroup(int group) { asm volatile("bar.sync %0, 128;" ::"r"(kMeeting + group) : "memory"); }
// Until another warpgroup has let this one go. Each waits once for each time that it is let go.
__device__ __forceinline__ int place_in_line(int group) { return kLine + recomputed(group); }
__device__ __forceinline__ void wait_to_be_let_go(int group) { asm volatile("bar.sync %0, 256;" ::"r"(place_in_line(group)) : "memory"); }
__device__ __forceinline__ void let_go(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(place_in_line(group)) : "memory"); }

// A tile in shared memory in rows of 128 bytes whose 16-byte parts are swizzled, part ^ row % 8, as TMA writes it; it begins at a
// multiple of 1024 bytes. `distance` is that of 64 columns to the next where B has columns side by side; otherwise it is ignored.
__device__ __forceinline__ uint64 matrix(uint32 address, uint32 distance) {
  constexpr uint64 kSwizzled128 = 1, kBytesOf8Rows = 1024;
  return (address & 0x3ffff) >> 4 | uint64(distance >> 4) << 16 | kBytesOf8Rows >> 4 << 32 | kSwizzled128 << 62;
}

// N columns of D. `shared`: A and B in shared memory, both with k side by side. `registers`: A in registers, and B with its columns
// side by side. Without `adds`, D is overwritten. `settle` is where registers that a product has written may first be read.
template <typename Element, int N> struct Products64;

// clang-format off: operands 8 at a time, of 16 columns.
#define WGMMA_D8(c) \
  "+f"(d[0][c]), "+f"(d[0][c + 1]), "+f"(d[1][c]), "+f"(d[1][c + 1]), "+f"(d[0][c + 2]), "+f"(d[0][c + 3]), "+f"(d[1][c + 2]), "+f"(d[1][c + 3])
#define WGMMA_D_32 \
  WGMMA_D8(0), WGMMA_D8(4)
#define WGMMA_D_64 \
  WGMMA_D_32, WGMMA_D8(8), WGMMA_D8(12)
#define WGMMA_D_80 \
  WGMMA_D_64, WGMMA_D8(16)
#define WGMMA_D_96 \
  WGMMA_D_80, WGMMA_D8(20)
#define WGMMA_D_128 \
  WGMMA_D_96, WGMMA_D8(24), WGMMA_D8(28)
#define WGMMA_D_192 \
  WGMMA_D_128, WGMMA_D8(32), WGMMA_D8(36), WGMMA_D8(40), WGMMA_D8(44)
#define WGMMA_D_256 \
  WGMMA_D_192, WGMMA_D8(48), WGMMA_D8(52), WGMMA_D8(56), WGMMA_D8(60)
#define WGMMA_P_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_P_64 \
  WGMMA_P_32 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_P_80 \
  WGMMA_P_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_P_96 \
  WGMMA_P_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_P_128 \
  WGMMA_P_96 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_P_192 \
  WGMMA_P_128 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_P_256 \
  WGMMA_P_192 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define WGMMA_PRODUCTS(element, type, n, a0, a1, a2, a3, b, add)                                                             \
  template <> struct Products64<element, n> {                                                                                  \
    static __device__ __forceinline__ void shared(float (&d)[2][n / 4], uint64 a_matrix, uint64 b_matrix, bool adds) {         \
      asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " a2 ", 0;\n\t"                                                       \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" WGMMA_P_##n "}, " a0 ", " a1           \
                   ", p, 1, 1, 0, 0;\n\t}" : WGMMA_D_##n : "l"(a_matrix), "l"(b_matrix), "r"(int(adds)));                     \
    }                                                                                                                          \
    static __device__ __forceinline__ void registers(float (&d)[2][n / 4], const uint32 (&a)[4], uint64 b_matrix, bool adds) {  \
      asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " add ", 0;\n\t"                                                      \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" WGMMA_P_##n "}, {" a0 ", " a1 ", " a2  \
                   ", " a3 "}, " b ", p, 1, 1, 1;\n\t}"                                                                        \
                   : WGMMA_D_##n : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_matrix), "r"(int(adds)));                               \
    }                                                                                                                          \
    static __device__ __forceinline__ void settle(float (&d)[2][n / 4]) { asm volatile("" : WGMMA_D_##n : : "memory"); }      \
  };
#define WGMMA_PRODUCTS_OF_BOTH(n, ...) \
  WGMMA_PRODUCTS(float16, "f16", n, __VA_ARGS__) WGMMA_PRODUCTS(bfloat16, "bf16", n, __VA_ARGS__)

WGMMA_PRODUCTS_OF_BOTH(64, "%32", "%33", "%34", "%35", "%36", "%37")
WGMMA_PRODUCTS_OF_BOTH(80, "%40", "%41", "%42", "%43", "%44", "%45")
WGMMA_PRODUCTS_OF_BOTH(96, "%48", "%49", "%50", "%51", "%52", "%53")
WGMMA_PRODUCTS_OF_BOTH(128, "%64", "%65", "%66", "%67", "%68", "%69")
WGMMA_PRODUCTS_OF_BOTH(192, "%96", "%97", "%98", "%99", "%100", "%101")
WGMMA_PRODUCTS_OF_BOTH(256, "%128", "%129", "%130", "%131", "%132", "%133")

// The gradient of cross-entropy with respect to the logits, in one read and one write of them:
//
//   dlogits = dloss (exp(logits - lse) - what the smoothed target gives to the class)
//
//   kAcross   neighbouring rows lie denser than a row does: kLanes threads lie side by side across rows, and so do the elements
//             of a vector; otherwise both lie along a row
//   kLanes    the threads that lie side by side; all others of a block have other classes (kAcross) or other rows
//   kVector   elements a load
//   kRagged   rows begin and end anywhere between two vectors; otherwise they, or all their runs, are whole ones
//   kDense    the classes of a row lie side by side
//   kLoads    vectors a thread has in flight
//   kIgnores  with an ignore_index
#include "_softmax/layout.cuh"
#include "device/online_softmax.cuh"

constexpr int kSlices = kThreads / kLanes;
constexpr int kRows = kAcross ? kVector : 1;                  // rows a thread has
constexpr int kPitch = kAcross ? kSlices : kLanes * kVector;  // classes from one load of a thread to its next
static_assert(!(kAcross && kRagged), "only rows are ragged, not runs across them");
static_assert(kDense || !kRagged, "only dense rows are ragged");

struct GradientParams {
  const Element* logits;  // [outer..., classes]
  const Target* targets;  // [outer...]
  const Score* lse;       // [outer...]
  const Score* dloss;     // [outer...], with strides of 0 for a loss without axes; null if it is `number`
  const Score* count;     // by which dloss is divided; null if it is `divisor`
  Result* out;            // [outer..., classes]
  int64 rows;             // the product of the outer sizes
  int64 classes;
  int64 outer[kMaxAxes];  // sizes; strides are in elements
  int64 logits_strides[kMaxAxes], targets_strides[kMaxAxes], lse_strides[kMaxAxes], dloss_strides[kMaxAxes],
      out_strides[kMaxAxes];
  int64 logits_step, out_step;  // from class to class
  int64 chunk, chunks;          // classes a block has, and how many such parts a row has
  int64 ignore_index;
  Score number, divisor;
  Score at_target, elsewhere;  // what the smoothed target gives to its class and to any other
};
static_assert(sizeof(GradientParams) == 296 + 4 * sizeof(Score), "the host packs as many bytes");

__device__ __forceinline__ int64 row_offset(const GradientParams& params, int64 row, const int64 (&strides)[kMaxAxes]) {
  return offset<kOuterAxes>(Index(row), params.outer, strides);
}

constexpr Index kIgnored = -1, kNone = -2;

// What a thread knows of a row.
struct Row {
  Score lse, scale;
  Index target;  // its place among the classes, or a number that no class has

  __device__ __forceinline__ Score gradient(const GradientParams& params, Score logit, Index at) const {
    const Score wanted = at == target ? params.at_target : params.elsewhere;
    // Halves come twice as fast as 4-byte elements, and show nothing of what the shorter exponential loses.
    const Score p = sizeof(Result) == 2 ? BaseE::exp_in_sum(logit - lse) : BaseE::exp(logit - lse);
    const Score gradient = scale * (p - wanted);
    return kIgnores && target == kIgnored ? Score(0) : gradient;  // whatever the logits are: 0 * NaN is NaN
  }
};

// The thread's rows, of which the first is `row`; `lead` is where the classes begin.
__device__ __forceinline__ void load_rows(const GradientParams& params, int64 row, Index lead, Row (&rows)[kRows]) {
  const Target* targets = params.targets + row_offset(params, row, params.targets_strides);
  const Score* lse = params.lse + row_offset(params, row, params.lse_strides);
  const Score* dloss = params.dloss + (params.dloss ? row_offset(params, row, params.dloss_strides) : 0);
  const Score factor = 1 / (params.count ? *params.count : params.divisor);
  const Score infinite = infinity<Score>();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {  // one after the other along the last axis
    const int64 target = int64(targets[r * params.targets_strides[kOuterAxes - 1]]);
    const bool valid = uint64(target) < uint64(params.classes);
    const Score above = params.dloss ? dloss[r * params.dloss_strides[kOuterAxes - 1]] : params.number;
    rows[r] = {
        lse[r * params.lse_strides[kOuterAxes - 1]],
        valid ? above * factor : infinite - infinite,
        kIgnores && target == params.ignore_index ? kIgnored : valid ? Index(target) + lead : kNone,
    };
  }
}

constexpr uint32 kWhole = (1u << kVector) - 1;

// Which elements of the vector at `at` there are, one bit for each, of a row whose classes are from `lead` to before `end`.
__device__ __forceinline__ uint32 present(Index at, Index lead, Index end) {
  if (!kRagged) return at < end ? kWhole : 0;
  const Index head = max_of(lead - at, Index(0)), tail = max_of(at + kVector - end, Index(0));
  return head < kVector && tail < kVector ? (kWhole << head) & (kWhole >> tail) : 0;
}

// Whether there is a part of a vector only, and element i in it.
__device__ __forceinline__ bool part_has(uint32 bits, int i) { return bits != kWhole && bits >> i & 1; }

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    cross_entropy_backward(const __grid_constant__ GradientParams params) {
  // Blocks that follow one another read what lies side by side: parts of a row, or tiles of rows.
  const uint32 chunks = uint32(params.chunks), tiles = gridDim.x / chunks;
  const uint32 chunk = kAcross ? blockIdx.x / tiles : blockIdx.x % chunks;
  const uint32 tile = kAcross ? blockIdx.x % tiles : blockIdx.x / chunks;
  const int lane = threadIdx.x % kLanes, slice = threadIdx.x / kLanes;
  const int64 row = kAcross ? (int64(tile) * kLanes + lane) * kVector : int64(tile) * kSlices + slice;
  if (row >= params.rows) return;

  // Classes are counted from the last whole vector of memory that is not past the row's beginning; in both arrays alike.
  const Element* logits = params.logits + row_offset(params, row, params.logits_strides);
  const Index lead = kRagged ? Index(reinterpret_cast<uint64>(logits) / sizeof(Element) % kVector) : 0;
  Result* out = params.out + row_offset(params, row, params.out_strides) - lead;
  logits -= lead;
  const Index start = Index(chunk * params.chunk);
  const Index end = min_of(start + Index(params.chunk), Index(params.classes) + lead);

  Row rows[kRows];
  load_rows(params, row, lead, rows);
  for (Index first = start + (kAcross ? slice : lane * kVector); first < end; first += kPitch * kLoads) {
    Vector<Element, kVector> loaded[kLoads];
#pragma unroll
    for (int v = 0; v < kLoads; ++v) {
      const Index at = first + v * kPitch;
      const Element* from = logits + (kDense ? int64(at) : at * params.logits_step);
      loaded[v] = load<kVector>(from, present(at, lead, end) == kWhole, Score(0));
    }
    // A vector at either end of a row may be in part another row's: after all loads, for a branch at each would part them.
    const bool any_part = kRagged && (first < lead || first + Index((kLoads - 1) * kPitch + kVector) > end);
    if (any_part) {
#pragma unroll
      for (int i = 0; i < kLoads * kVector; ++i) {
        const Index at = first + i / kVector * kPitch;
        if (part_has(present(at, lead, end), i % kVector)) loaded[i / kVector].at[i % kVector] = logits[at + i % kVector];
      }
    }
#pragma unroll
    for (int v = 0; v < kLoads; ++v) {  // what this thread has read: out may be the logits
      const Index at = first + v * kPitch;
      Score gradient[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        gradient[i] = rows[kAcross ? i : 0].gradient(params, widen(loaded[v].at[i]), kAcross ? at : at + i);
      }
      const uint32 bits = present(at, lead, end);
      store<kVector>(gradient, bits == kWhole, out + (kDense ? int64(at) : at * params.out_step));
      if (any_part) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          if (part_has(bits, i)) out[at + i] = narrow<Result>(gradient[i]);
        }
      }
    }
  }
}

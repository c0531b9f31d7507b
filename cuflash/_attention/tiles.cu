// Which key tiles each query tile visits, where variants hide places: their masks are evaluated on ranges of coordinates.
//
// A warp classifies 32 key tiles of one query tile. Constants: those of the attention kernel whose tiles they are.
#include "_attention/tile_loop.cuh"

// Of the query tile: the rows that exist, with the heads that are packed in it.
__device__ __forceinline__ interval::Area area(const Params& params, const BlockIndex& index, const KeyInterval& keys) {
  using interval::between;
  using interval::exactly;
  const int first = index.tile * kBlockM, last = first + keys.rows - 1, pack = 1 << keys.pack_shift;
  const int top = first >> keys.pack_shift, bottom = last >> keys.pack_shift;
  const auto at = coordinates(params, index, keys, 0);
  interval::Area area;
  for (int axis = 0; axis < kBatchAxes; ++axis) area.entry[axis] = at.entry[axis];
  area.b = exactly(at.b);
  area.h = between(index.head * pack, index.head * pack + pack - 1);
  area.row = between(top, bottom);
  area.i = between(top + keys.start, bottom + keys.start);
  area.len_q = exactly(index.len_q(params) >> keys.pack_shift);
  area.len_k = exactly(keys.length);
  return area;
}

extern "C" __global__ void __launch_bounds__(128) attention_tiles(const __grid_constant__ Params params) {
  const TileBits& bits = params.bits;
  if (blockIdx.x == 0 && threadIdx.x == 0) *bits.counter = 0;
  const int64 warp = blockIdx.x * 4ll + threadIdx.x / 32;
  const int task = int(warp / bits.words), word = int(warp % bits.words);
  if (task >= bits.tasks) return;
  const BlockIndex index(params, task * kSlices);
  if (kVarlen && index.sequence.rows == 0) return;
  bool repeats = index.head > 0 && bits.head == 0;  // heads and batches whose tiles are the first one's; each sequence has its own
#pragma unroll
  for (int axis = 0; axis < kBatchAxes; ++axis) repeats |= !kVarlen && index.batch[axis] > 0 && bits.batch[axis] == 0;
  if (repeats) return;

  const KeyInterval keys(params, index);
  const int first = (word * 32 + threadIdx.x % 32) * kBlockN, begin = max_of(first, keys.begin()), end = min_of(first + kBlockN, keys.end());
  interval::Truth seen = {true, false};
  if (begin < end) {
    interval::Area at = area(params, index, keys);
    at.j = interval::between(begin, end - 1);
    seen = visible(params.variant, at);
  }
  const uint32 visited = __ballot_sync(0xffffffffu, seen.yes), partial = __ballot_sync(0xffffffffu, seen.no);
  if (threadIdx.x % 32 != 0) return;
  uint32* words = bits.of(index);
  words[word] = visited;
  words[bits.words + word] = partial;
}

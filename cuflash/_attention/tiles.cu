// Which key tiles each query tile visits, where variants hide places: their masks are evaluated on ranges of coordinates.
//
// A warp classifies 32 key tiles of one query tile. Where there are arrays of truth values, with so many elements a tile that one lane
// cannot look at them, the warps of a block do that together, in tiles that nothing else decides; they all have the same 32 tiles then.
// Constants: those of the attention kernel whose tiles they are, and kWarps.
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

constexpr uint32 kAllLanes = 0xffffffffu;

// What the elements of the tiles in `open` are, for the lane that has the tile: each warp looks at some of the tiles.
__device__ __forceinline__ void look_up(interval::Truth (&dense)[kDense + 1], const Variant& variant, interval::Area at, uint32 open, int begin,
                                        int end) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __shared__ uint32 hides[kDense + 1], shows[kDense + 1];  // a bit for each tile
  for (int number = threadIdx.x; number < kDense; number += 32 * kWarps) hides[number] = shows[number] = 0;
  __syncthreads();  // before the first bit is set
  int turn = 0;
  for (uint32 left = open; left != 0; left &= left - 1) {
    if (turn++ % kWarps != warp) continue;
    const int tile = __ffs(left) - 1;
    at.j = interval::between(__shfl_sync(kAllLanes, begin, tile), __shfl_sync(kAllLanes, end, tile) - 1);
    for (int number = 0; number < kDense; ++number) {
      const interval::Truth own = dense_part(number, variant, at, lane, [](interval::Truth found) {
        return __any_sync(kAllLanes, found.no) && __any_sync(kAllLanes, found.yes);
      });
      const bool no = __any_sync(kAllLanes, own.no), yes = __any_sync(kAllLanes, own.yes);
      if (lane == 0 && no) atomicOr(&hides[number], 1u << tile);
      if (lane == 0 && yes) atomicOr(&shows[number], 1u << tile);
    }
  }
  __syncthreads();  // every warp has set its bits
  for (int number = 0; number < kDense; ++number) dense[number] = {bool(hides[number] >> lane & 1), bool(shows[number] >> lane & 1)};
}

extern "C" __global__ void __launch_bounds__(32 * kWarps, 1) attention_tiles(const __grid_constant__ Params params) {
  const TileBits& bits = params.bits;
  if (blockIdx.x == 0 && threadIdx.x == 0) *bits.counter = 0;
  const int64 unit = kDense > 0 ? blockIdx.x : blockIdx.x * int64(kWarps) + threadIdx.x / 32;
  const int task = int(unit / bits.words), word = int(unit % bits.words);
  if (task >= bits.tasks) return;
  const BlockIndex index(params, task * kSlices);
  if (kVarlen && index.sequence.rows == 0) return;
  bool repeats = index.head > 0 && bits.head == 0;  // heads and batches whose tiles are the first one's; each sequence has its own
#pragma unroll
  for (int axis = 0; axis < kBatchAxes; ++axis) repeats |= !kVarlen && index.batch[axis] > 0 && bits.batch[axis] == 0;
  if (repeats) return;

  const KeyInterval keys(params, index);
  const int first = (word * 32 + threadIdx.x % 32) * kBlockN, begin = max_of(first, keys.begin()), end = min_of(first + kBlockN, keys.end());
  interval::Area at = area(params, index, keys);
  at.j = interval::between(begin, end - 1);
  interval::Truth dense[kDense + 1];
  for (interval::Truth& each : dense) each = {true, true};
  interval::Truth seen = {true, false};
  if (begin < end) seen = visible(params.variant, at, dense);
  if constexpr (kDense > 0) {
    const uint32 open = __ballot_sync(kAllLanes, seen.no && seen.yes);  // the same in all warps of a block
    if (open != 0) {
      look_up(dense, params.variant, at, open, begin, end);
      if (open >> threadIdx.x % 32 & 1) seen = visible(params.variant, at, dense);
    }
  }
  const uint32 visited = __ballot_sync(kAllLanes, seen.yes), partial = __ballot_sync(kAllLanes, seen.no);
  if (threadIdx.x % (kDense > 0 ? 32 * kWarps : 32) != 0) return;
  uint32* words = bits.of(index);
  words[word] = visited;
  words[bits.words + word] = partial;
}

// Sequences of any lengths that lie behind one another in packed arrays, for attention_varlen.
#include "device/types.cuh"

// Where one lies, and its query tiles among all.
struct Sequence {
  int first_row, rows;    // of q, out and lse
  int first_key, keys;    // of k and v
  int first_tile, tiles;  // query tiles; those of the sequences that have most keys come first
};

// What sequences.cu finds out for the kernels behind it.
struct Sequences {
  Sequence* each;       // [count + 2]; after the last one, rows that are of none and see no key, and the rows' end
  int* of_tile;         // [tiles], the sequence that each query tile is of
  int* tiles;           // how many there are, of each head
  const void* offsets[2];  // of rows and of keys, [count + 1]
  int64 strides[2];     // in elements
  int bytes[2];         // of an offset: 4 or 8
  int count;
};

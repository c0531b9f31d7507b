// What Python's arithmetic is in CUDA C++, for expressions of a caller's own, which _attention/variants/cuda.py writes out.
//
// Integers have 32 bits and wrap; // and % round towards minus infinity, and by 0 give 0. minimum and maximum are NaN where either is.
// An index outside of an array is moved to its nearest end.
#include "device/mma.cuh"

namespace expression {

__device__ __forceinline__ int add(int a, int b) { return int(uint32(a) + uint32(b)); }
__device__ __forceinline__ int subtract(int a, int b) { return int(uint32(a) - uint32(b)); }
__device__ __forceinline__ int multiply(int a, int b) { return int(uint32(a) * uint32(b)); }
__device__ __forceinline__ int negate(int a) { return int(0u - uint32(a)); }

__device__ __forceinline__ int floor_divide(int a, int b) {
  if (b == 0) return 0;
  if (b == -1) return negate(a);  // the smallest integer has no negative
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}
__device__ __forceinline__ int remainder(int a, int b) {
  if (b == 0 || b == -1) return 0;
  const int rest = a % b;
  return rest != 0 && (a < 0) != (b < 0) ? rest + b : rest;
}

// The same by what the compiler does not know. 2^32 / b gives a quotient that is right or too small by 1, and is computed once for all a.
struct Quotient {
  uint32 whole, rest;
  __device__ __forceinline__ Quotient(uint32 a, uint32 b) {
    whole = uint64(a) * (0xffffffffu / b) >> 32;
    rest = a - whole * b;
    if (rest >= b) {
      ++whole;
      rest -= b;
    }
  }
};
__device__ __forceinline__ uint32 magnitude(int a) { return a < 0 ? 0u - uint32(a) : uint32(a); }
__device__ __forceinline__ int floor_divide_by(int a, int b) {
  const Quotient found(magnitude(a), max_of(magnitude(b), 1u));
  const int floor = int((a < 0) == (b < 0) ? found.whole : 0u - found.whole - (found.rest != 0));
  return b == 0 ? 0 : floor;
}
__device__ __forceinline__ int remainder_by(int a, int b) {
  const uint32 size = max_of(magnitude(b), 1u), rest = Quotient(magnitude(a), size).rest;
  const uint32 towards_b = rest != 0 && (a < 0) != (b < 0) ? size - rest : rest;
  return int(b < 0 ? 0u - towards_b : towards_b);  // 0 where b is 0
}
template <typename T> __device__ __forceinline__ T remainder(T a, T b) {
  const T rest = fmod(a, b);
  if (rest == T(0)) return copysign(T(0), b);
  return (rest < T(0)) != (b < T(0)) ? rest + b : rest;
}
template <typename T> __device__ __forceinline__ T floor_divide(T a, T b) {
  if (b == T(0)) return a / b;
  const T rest = fmod(a, b);
  T quotient = (a - rest) / b;
  if (rest != T(0) && (rest < T(0)) != (b < T(0))) quotient -= T(1);
  const T whole = floor(quotient);
  return quotient == T(0) ? copysign(T(0), a / b) : quotient - whole > T(0.5) ? whole + T(1) : whole;
}

template <typename T> __device__ __forceinline__ T minimum(T a, T b) { return a < b || a != a ? a : b; }
template <typename T> __device__ __forceinline__ T maximum(T a, T b) { return a > b || a != a ? a : b; }
__device__ __forceinline__ int absolute(int a) { return a < 0 ? negate(a) : a; }
__device__ __forceinline__ float absolute(float a) { return fabsf(a); }
__device__ __forceinline__ double absolute(double a) { return fabs(a); }

// Beside operands of 16 bits the hardware's own functions do, whose errors are of 10 to 22 bits.
template <bool kApproximate> struct Functions {
  static __device__ __forceinline__ float exp(float a) { return expf(a); }
  static __device__ __forceinline__ float log(float a) { return logf(a); }
  static __device__ __forceinline__ float tanh(float a) { return tanhf(a); }
  static __device__ __forceinline__ float sqrt(float a) { return sqrtf(a); }
  static __device__ __forceinline__ double exp(double a) { return ::exp(a); }
  static __device__ __forceinline__ double log(double a) { return ::log(a); }
  static __device__ __forceinline__ double tanh(double a) { return ::tanh(a); }
  static __device__ __forceinline__ double sqrt(double a) { return ::sqrt(a); }
};
template <> struct Functions<true> {
  static __device__ __forceinline__ float exp(float a) { return __expf(a); }
  static __device__ __forceinline__ float log(float a) { return __logf(a); }
  static __device__ __forceinline__ float tanh(float a) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(a));
    return y;
  }
  static __device__ __forceinline__ float sqrt(float a) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a));
    return y;
  }
};

// Memory that no kernel writes to meanwhile, so that a value may be kept, or read early.
template <typename T> __device__ __forceinline__ T constant(const T* from) { return __ldg(from); }
__device__ __forceinline__ float16 constant(const float16* from) { return {__ldg(&from->bits)}; }
__device__ __forceinline__ bfloat16 constant(const bfloat16* from) { return {__ldg(&from->bits)}; }
__device__ __forceinline__ bool constant(const bool* from) { return __ldg(reinterpret_cast<const unsigned char*>(from)) != 0; }

// The same where the condition holds, and zeros elsewhere. One instruction with a predicate: the compiler, left alone, makes branches, and
// runs out of registers.
__device__ __forceinline__ void load_if(bool condition, const void* from, unsigned char& to) {
  uint32 word;
  asm("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %2, 0;\n\tmov.b32 %0, 0;\n\t@p ld.global.nc.u8 %0, [%1];\n\t}"
      : "=r"(word) : "l"(from), "r"(int(condition)));
  to = word;
}
__device__ __forceinline__ void load_if(bool condition, const void* from, uint16& to) {
  asm("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %2, 0;\n\tmov.b16 %0, 0;\n\t@p ld.global.nc.b16 %0, [%1];\n\t}"
      : "=h"(to) : "l"(from), "r"(int(condition)));
}
__device__ __forceinline__ void load_if(bool condition, const void* from, uint32& to) {
  asm("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %2, 0;\n\tmov.b32 %0, 0;\n\t@p ld.global.nc.b32 %0, [%1];\n\t}"
      : "=r"(to) : "l"(from), "r"(int(condition)));
}
__device__ __forceinline__ void load_if(bool condition, const void* from, uint64& to) {
  asm("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %2, 0;\n\tmov.b64 %0, 0;\n\t@p ld.global.nc.b64 %0, [%1];\n\t}"
      : "=l"(to) : "l"(from), "r"(int(condition)));
}
template <typename T> struct WordOf;
template <> struct WordOf<bool> { using type = unsigned char; };
template <> struct WordOf<signed char> { using type = unsigned char; };
template <> struct WordOf<unsigned char> { using type = unsigned char; };
template <> struct WordOf<short> { using type = uint16; };
template <> struct WordOf<uint16> { using type = uint16; };
template <> struct WordOf<float16> { using type = uint16; };
template <> struct WordOf<bfloat16> { using type = uint16; };
template <> struct WordOf<int> { using type = uint32; };
template <> struct WordOf<float> { using type = uint32; };
template <> struct WordOf<int64> { using type = uint64; };
template <> struct WordOf<double> { using type = uint64; };
template <typename T> __device__ __forceinline__ T constant_if(bool condition, const T* from) {
  typename WordOf<T>::type word;
  load_if(condition, from, word);
  return reinterpret_cast<const T&>(word);
}
template <> __device__ __forceinline__ bool constant_if<bool>(bool condition, const bool* from) {
  unsigned char word;
  load_if(condition, from, word);
  return word != 0;
}

// An element as expressions have it: floating-point numbers are Number, integers have 32 bits.
template <typename Number> struct Value {
  static __device__ __forceinline__ bool of(bool x) { return x; }
  static __device__ __forceinline__ int of(signed char x) { return x; }
  static __device__ __forceinline__ int of(unsigned char x) { return x; }
  static __device__ __forceinline__ int of(short x) { return x; }
  static __device__ __forceinline__ int of(uint16 x) { return x; }
  static __device__ __forceinline__ int of(int x) { return x; }
  static __device__ __forceinline__ int of(int64 x) { return int(x); }
  static __device__ __forceinline__ Number of(double x) { return Number(x); }
  template <typename T> static __device__ __forceinline__ Number of(T x) { return Number(widen(x)); }
};

// Of 32 elements of a row, the two neighbours of each 8 that an accumulator's lane has (device/mma.cuh). Each of a row's four lanes reads
// 8 elements at once, and they exchange then: a quarter of the requests to memory, or less.
template <typename T> struct Pairs {
  static_assert(sizeof(T) == 2, "two fill a word");
  uint32 words[4];

  // `first`: of this lane's 8, at a multiple of their size. Volatile: it is to be under way early.
  __device__ __forceinline__ void load(const T* first, bool exists) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %5, 0;\n\tmov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\tmov.b32 %2, 0;\n\tmov.b32 %3, 0;\n\t"
                 "@p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];\n\t}"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(first), "r"(int(exists)));
  }
  __device__ __forceinline__ void exchange() { transpose_quad(words); }
  __device__ __forceinline__ T at(int c) const { return {uint16(words[c / 2] >> c % 2 * 16)}; }
};

// A lane's 8 are two words, of four pieces for the four lanes.
template <> struct Pairs<bool> {
  uint32 words[2];

  __device__ __forceinline__ void load(const bool* first, bool exists) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %3, 0;\n\tmov.b32 %0, 0;\n\tmov.b32 %1, 0;\n\t@p ld.global.nc.v2.b32 {%0, %1}, [%2];\n\t}"
                 : "=r"(words[0]), "=r"(words[1]) : "l"(first), "r"(int(exists)));
  }
  __device__ __forceinline__ void exchange() {
    const bool back = threadIdx.x & 2, odd = threadIdx.x & 1;
    const uint32 far = __shfl_xor_sync(0xffffffffu, back ? words[0] : words[1], 2);
    const uint32 one = back ? far : words[0], other = back ? words[1] : far;  // of the blocks odd, and odd + 2
    const uint32 near = __shfl_xor_sync(0xffffffffu, __byte_perm(one, other, odd ? 0x5410 : 0x7632), 1);
    words[0] = __byte_perm(one, near, odd ? 0x3254 : 0x5410);
    words[1] = __byte_perm(other, near, odd ? 0x3276 : 0x7610);
  }
  __device__ __forceinline__ bool at(int c) const { return words[c / 4] & 0xffu << c % 4 * 8; }
};

constexpr int kBatchAxes = 4;

// An array that expressions index along kAxes axes; along the batch it is walked with the operands. Strides in elements; kUnit: the last is 1.
template <typename T, int kAxes, bool kUnit> struct Array {
  const T* data;
  int64 batch[kBatchAxes];
  int64 strides[kAxes];
  int lengths[kAxes + kAxes % 2];

  __device__ __forceinline__ int64 stride(int axis) const { return kUnit && axis == kAxes - 1 ? 1 : strides[axis]; }

  template <typename... Index> __device__ __forceinline__ T at(const int (&entry)[kBatchAxes], Index... indices) const {
    return constant(begin(entry) + offset(0, indices...));
  }
  // The last index is key + step, of an array that has all keys: what it has not is no key, and its score will not count.
  template <typename... Index>
  __device__ __forceinline__ T along(const int (&entry)[kBatchAxes], int key, int step, Index... indices) const {
    const T* first = begin(entry) + offset(0, indices...) + key * stride(kAxes - 1);
    return constant_if(step < lengths[kAxes - 1] - key, first + step * stride(kAxes - 1));
  }

  // Of the 32 elements whose last index begins 8 below `key` for each lane of a row before this one: those of this lane.
  template <typename... Index>
  __device__ __forceinline__ Pairs<T> pairs(const int (&entry)[kBatchAxes], int key, Index... indices) const {
    Pairs<T> found;
    found.load(begin(entry) + offset(0, indices...) + key, key + 8 <= lengths[kAxes - 1]);
    return found;
  }

  __device__ __forceinline__ const T* begin(const int (&entry)[kBatchAxes]) const {
    const T* first = data;
#pragma unroll
    for (int axis = 0; axis < kBatchAxes; ++axis) first += entry[axis] * batch[axis];
    return first;
  }
  __device__ __forceinline__ int64 offset(int) const { return 0; }
  template <typename... Index> __device__ __forceinline__ int64 offset(int axis, int index, Index... rest) const {
    return min_of(max_of(index, 0), lengths[axis] - 1) * stride(axis) + offset(axis + 1, rest...);
  }
};

// Where a row's scores stand: what expressions may name, and the first of the keys in question.
template <typename Number> struct Coordinates {
  int entry[kBatchAxes];  // of the batch
  int b, h, i, row, key, len_q, len_k;
  Number scale;
};

}  // namespace expression

// Codes to levels in registers, and floats to 16-bit ones.
//
// A lane reads its codes for a stage of a tile at once. They lie in quads of 4; a quad's code i is at bit i * 4 of its
// half word, so that after one shift a quad selects 4 of 8 bytes of levels in one byte permutation. A quad gives 4
// bytes of a fragment's register, or 2 registers of 2 16-bit floats each.
#pragma once

#include "core/warp.cuh"
#include "repetition/cuda_kernels.h"

namespace pycodesign::repetition::cuda {

template <int bits> __device__ __forceinline__ uint32_t select_quad(const uint32_t* words, int quad) {
  constexpr int in_word = 8 / bits, in_half = in_word / 2;
  const int place = quad % in_word;
  return words[quad / in_word] >> (16 * (place / in_half) + bits * (place % in_half));
}

// Four bytes of a table of up to 16.
template <int bits> __device__ __forceinline__ uint32_t look_up(const uint32_t* table, uint32_t quad) {
  if constexpr (bits < 4) return __byte_perm(table[0], 0, quad & (bits == 1 ? 0x1111 : 0x3333));
  const uint32_t low = __byte_perm(table[0], table[1], quad & 0x7777);
  const uint32_t high = __byte_perm(table[2], table[3], quad & 0x7777);
  return __byte_perm(low, high, 0x3210 | (quad & 0x8888) >> 1);
}

// Fragments of A, as core/warp.cuh has them: of the two halves of a tile, rows `half` * 16 to + 15, for a step of 32
// bytes; `step` is 0 or 1.
struct Bytes {
  static constexpr bool integers = true;
  static constexpr int planes = 1;
  template <int bits> static constexpr int lane_words = cuda::lane_words(integers, bits);
  using Sum = int32_t;

  template <int bits> static __device__ __forceinline__ void unpack(uint32_t (&a)[2][4], const uint32_t* words,
                                                                    const Lookup& lookup, int step) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int quad = 8 * step + i;
      if constexpr (bits == 8) a[i / 4][i % 4] = words[quad];
      else a[i / 4][i % 4] = look_up<bits>(lookup.word, select_quad<bits>(words, quad));
    }
  }
  static __device__ __forceinline__ void multiply(Sum (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    core::cuda::multiply_s8(c, a, b0, b1);
  }
};

// An input is the sum of `planes` 16-bit floats.
template <int planes_> struct Pairs {
  static constexpr bool integers = false;
  static constexpr int planes = planes_;
  template <int bits> static constexpr int lane_words = cuda::lane_words(integers, bits);
  using Sum = float;

  template <int bits> static __device__ __forceinline__ void unpack(uint32_t (&a)[2][4], const uint32_t* words,
                                                                    const Lookup& lookup, int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // pairs of registers
      const int quad = 4 * step + i;
      uint32_t* pair = &a[i / 2][i % 2 * 2];
      if constexpr (bits == 16) {
        pair[0] = words[2 * quad];
        pair[1] = words[2 * quad + 1];
      } else {
        const uint32_t selected = select_quad<bits>(words, quad);
        const uint32_t low = look_up<bits>(lookup.word, selected), high = look_up<bits>(lookup.word + 4, selected);
        pair[0] = __byte_perm(low, high, 0x5140);
        pair[1] = __byte_perm(low, high, 0x7362);
      }
    }
  }
};
struct Floats : Pairs<planes_f32> {
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    core::cuda::multiply_bf16(c, a, b0, b1);
  }
};
struct BFloat16 : Pairs<1> {
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    core::cuda::multiply_bf16(c, a, b0, b1);
  }
};
struct Float16 : Pairs<1> {
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    core::cuda::multiply_f16(c, a, b0, b1);
  }
};

// A lane's words of one stage of a tile, in the widest loads that they fill.
template <int count>
__device__ __forceinline__ void load_words(uint32_t (&words)[count], const uint32_t* from, int lane) {
  if constexpr (count == 1) {
    words[0] = __ldg(from + lane);
  } else if constexpr (count == 2) {
    const uint2 two = __ldg(reinterpret_cast<const uint2*>(from) + lane);
    words[0] = two.x;
    words[1] = two.y;
  } else {
#pragma unroll
    for (int i = 0; i < count / 4; ++i) {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(from) + i * core::cuda::warp_size + lane);
      words[4 * i] = four.x;
      words[4 * i + 1] = four.y;
      words[4 * i + 2] = four.z;
      words[4 * i + 3] = four.w;
    }
  }
}

// x = the sum of three bfloat16 numbers, exactly: each takes the next 8 bits of it.
struct Terms {
  uint32_t bits[planes_f32];  // in the high halves
};
__device__ __forceinline__ Terms split_float(float x) {
  Terms terms;
  terms.bits[0] = __float_as_uint(x) & 0xffff0000;
  const float rest = __fsub_rn(x, __uint_as_float(terms.bits[0]));
  terms.bits[1] = __float_as_uint(rest) & 0xffff0000;
  terms.bits[2] = __float_as_uint(__fsub_rn(rest, __uint_as_float(terms.bits[1])));
  return terms;
}

// Neighboring inputs as the halves of a register, in every plane.
__device__ __forceinline__ void pair_inputs(uint32_t (&pair)[planes_f32], float first, float second) {
  const Terms low = split_float(first), high = split_float(second);
#pragma unroll
  for (int p = 0; p < planes_f32; ++p) pair[p] = low.bits[p] >> 16 | (high.bits[p] & 0xffff0000);
}
__device__ __forceinline__ void pair_inputs(uint32_t (&pair)[1], uint16_t first, uint16_t second) {
  pair[0] = first | static_cast<uint32_t>(second) << 16;
}

// Calls f<T, bits>() for the type and the codes of a layer.
template <class T, class F> void by_bits(int bits, F f) {
  switch (bits) {
    case 1: return f.template run<T, 1>();
    case 2: return f.template run<T, 2>();
    case 4: return f.template run<T, 4>();
    default: return f.template run<T, T::integers ? 8 : 16>();
  }
}
template <class F> void by_codes(DType dtype, int bits, F f) {
  switch (dtype) {
    case DType::f32: return by_bits<Floats>(bits, f);
    case DType::f16: return by_bits<Float16>(bits, f);
    case DType::bf16: return by_bits<BFloat16>(bits, f);
    default: return by_bits<Bytes>(bits, f);
  }
}

inline unsigned blocks_of(int64_t count, int64_t in_block) {
  return static_cast<unsigned>((count + in_block - 1) / in_block);
}

}  // namespace pycodesign::repetition::cuda

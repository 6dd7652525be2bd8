// Products with few rows of x, read as they are: each code once, bound by the bytes of codes.
#include <type_traits>

#include "core/warp.cuh"
#include "repetition/cuda_codes.cuh"
#include "repetition/cuda_finish.cuh"
#include "repetition/cuda_kernels.h"

namespace pycodesign::repetition::cuda {
namespace {

using namespace core::cuda;

// Fragments of B of one step, from a row of x itself; a lane without a row has zeros.
template <class T> struct RowReader {
  using Element = std::conditional_t<T::planes == 1, uint16_t, float>;
  struct alignas(2 * sizeof(Element)) Two {
    Element first, second;
  };

  // 2 inputs from `input` on
  static __device__ __forceinline__ void load(uint32_t (&pair)[T::planes], const Rows& r, const char* row, int input,
                                              int end) {
    Two two{};
    if (row && input < end) {
      if (r.is_packed) {
        two = *reinterpret_cast<const Two*>(row + input * static_cast<int>(sizeof(Element)));
      } else {
        two.first = *reinterpret_cast<const Element*>(row + input * r.stride[1]);
        if (input + 1 < end) two.second = *reinterpret_cast<const Element*>(row + (input + 1) * r.stride[1]);
      }
    }
    pair_inputs(pair, two.first, two.second);
  }
  static __device__ __forceinline__ void multiply(const Rows& r, const char* row, int input, int end, int lane,
                                                  const uint32_t (&a)[2][4], float (&sum)[2][4]) {
    uint32_t b0[T::planes], b1[T::planes];
    load(b0, r, row, input + lane % 4 * 2, end);
    load(b1, r, row, input + 8 + lane % 4 * 2, end);
#pragma unroll
    for (int p = T::planes - 1; p >= 0; --p) {
      T::multiply(sum[0], a[0], b0[p], b1[p]);
      T::multiply(sum[1], a[1], b0[p], b1[p]);
    }
  }
};
template <> struct RowReader<Bytes> {
  // 4 bytes of inputs from `input` on
  static __device__ __forceinline__ uint32_t load(const Rows& r, const char* row, int input, int end) {
    uint32_t word = 0;
    if (r.is_packed) {  // x - 128 is x with its highest bit flipped
      if (input < end) word = *reinterpret_cast<const uint32_t*>(row + input) ^ (r.center ? 0x80808080 : 0);
      return word;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (input + i < end) {
        const char* at = row + (input + i) * r.stride[1];
        const int value =
            r.dtype == DType::u8 ? *reinterpret_cast<const uint8_t*>(at) : *reinterpret_cast<const int8_t*>(at);
        word |= static_cast<uint32_t>((value - r.center) & 0xff) << 8 * i;
      }
    return word;
  }
  static __device__ __forceinline__ void multiply(const Rows& r, const char* row, int input, int end, int lane,
                                                  const uint32_t (&a)[2][4], int32_t (&sum)[2][4]) {
    const uint32_t b0 = row ? load(r, row, input + lane % 4 * 4, end) : 0;
    const uint32_t b1 = row ? load(r, row, input + 16 + lane % 4 * 4, end) : 0;
    multiply_s8(sum[0], a[0], b0, b1);
    multiply_s8(sum[1], a[1], b0, b1);
  }
};

// A block multiplies one tile of outputs by 8 rows; its warps share the stages, and add up in their order.
template <class T, int bits> __global__ void __launch_bounds__(rows_warps* warp_size, 2)
    multiply_few_rows(const __grid_constant__ Rows r) {
  constexpr int count = T::template lane_words<bits>, step_inputs = T::integers ? 32 : 16;
  constexpr int batch = count < 8 ? 4 : count < 16 ? 2 : 1;  // stages whose words are under way at once
  using Total = std::conditional_t<T::integers, int32_t, float>;
  __shared__ Total totals[rows_warps][tile_outputs * rows_block];
  const int lane = static_cast<int>(threadIdx.x) % warp_size, warp = static_cast<int>(threadIdx.x) / warp_size;
  const int tile = static_cast<int>(blockIdx.x), stages = r.part_stages * r.parts;
  const int row = static_cast<int>(blockIdx.y) * rows_block + lane / 4;
  const char* x = row < r.rows ? r.x + row * r.stride[0] : nullptr;
  constexpr int64_t stage_words = count * warp_size;
  const uint32_t* from = r.weights.words + tile * stages * stage_words;

  typename T::Sum sum[2][4] = {};
  Total total[2][4] = {};
  const int first = stages * warp / rows_warps, last = stages * (warp + 1) / rows_warps;
  for (int s = first; s < last; s += batch) {
    uint32_t words[batch][count];
#pragma unroll
    for (int k = 0; k < batch; ++k) load_words(words[k], from + min(s + k, last - 1) * stage_words, lane);
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      if (s + k >= last) break;
      const int part = (s + k) / r.part_stages, in_part = (s + k) % r.part_stages * 2 * step_inputs;
      const int end = (part + 1) * r.part_inputs;
      for (int term = 0; term < r.weights.terms; ++term) {
        if constexpr (bits == 16) {
          if (term > 0) load_words(words[k], from + term * r.weights.term_words + (s + k) * stage_words, lane);
        }
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          uint32_t a[2][4];
          T::template unpack<bits>(a, words[k], r.weights.lookup[term], step);
          RowReader<T>::multiply(r, x, part * r.part_inputs + in_part + step * step_inputs, end, lane, a, sum);
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (T::integers) total[m][i] = sum[m][i];
          else {
            const int output = min(tile * tile_outputs + m * 16 + i / 2 * 8 + lane / 4, r.outputs - 1);
            total[m][i] =
                fmaf(sum[m][i], r.output.multiplier[static_cast<int64_t>(part) * r.outputs + output], total[m][i]);
            sum[m][i] = 0;
          }
        }
    }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      totals[warp][(m * 16 + i / 2 * 8 + lane / 4) * rows_block + lane % 4 * 2 + i % 2] = total[m][i];
  barrier();
  const int mine = static_cast<int>(threadIdx.x), output = tile * tile_outputs + mine / rows_block;
  const int to = static_cast<int>(blockIdx.y) * rows_block + mine % rows_block;
  if (output >= r.outputs || to >= r.rows) return;
  Total y = totals[0][mine];
  for (int w = 1; w < rows_warps; ++w) y += totals[w][mine];
  finish(r.output, y, output, to * r.output.out_stride[3], to * r.output.residual_stride[3]);
}

template <class T, int bits> void launch_rows(const Rows& r, cudaStream_t stream) {
  launch(multiply_few_rows<T, bits>, dim3(static_cast<unsigned>(r.tiles), blocks_of(r.rows, rows_block)),
         rows_warps * warp_size, 0, stream, r);
}

struct MultiplyRows {
  const Rows& r;
  cudaStream_t stream;
  template <class T, int bits> void run() const { launch_rows<T, bits>(r, stream); }
};

}  // namespace

void multiply_rows(const Rows& r, void* stream) {
  by_codes(r.dtype, r.weights.bits, MultiplyRows{r, static_cast<cudaStream_t>(stream)});
}

}  // namespace pycodesign::repetition::cuda

// Layers as matrix products: staging, the product of codes and pixels, and the sum of its parts. README.md beside this
// file draws the tiles.

#include "core/warp.cuh"
#include "repetition/cuda_codes.cuh"
#include "repetition/cuda_finish.cuh"
#include "repetition/cuda_kernels.h"

namespace pycodesign::repetition::cuda {
namespace {

using namespace core::cuda;

constexpr int stage_threads = 256;

__device__ __forceinline__ void pack_chunk(const Stage&, uint4* to, const int32_t (&element)[16]) {
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) words[i / 4] |= static_cast<uint32_t>(element[i] & 0xff) << i % 4 * 8;
  *to = make_uint4(words[0], words[1], words[2], words[3]);
}
template <class T> __device__ __forceinline__ void pack_chunk(const Stage& s, uint4* to, const T (&element)[8]) {
  constexpr int planes = sizeof(T) == 4 ? planes_f32 : 1;
  uint32_t words[4][planes];
#pragma unroll
  for (int i = 0; i < 4; ++i) pair_inputs(words[i], element[2 * i], element[2 * i + 1]);
#pragma unroll
  for (int p = 0; p < planes; ++p) to[p * s.plane] = make_uint4(words[0][p], words[1][p], words[2][p], words[3][p]);
}

// An element of x; an integer is centered, a 16-bit float is its bits.
template <class T> __device__ __forceinline__ auto load_element(const Stage& s, const char* at) {
  const T value = *reinterpret_cast<const T*>(at);
  if constexpr (sizeof(T) == 1) return static_cast<int32_t>(value) - s.center;
  else return value;
}

// A chunk of x that is packed, or of padding.
__device__ __forceinline__ uint4 load_chunk(const Stage& s, const char* at, bool is_inside) {
  if (!is_inside) {
    const uint32_t pad = static_cast<uint32_t>(s.pad & 0xff) * 0x01010101;
    return make_uint4(pad, pad, pad, pad);
  }
  const uint32_t flip = s.center ? 0x80808080 : 0;  // x - 128
  const uint4 chunk = __ldg(reinterpret_cast<const uint4*>(at));
  return make_uint4(chunk.x ^ flip, chunk.y ^ flip, chunk.z ^ flip, chunk.w ^ flip);
}

// A thread makes a chunk. Neighbors take neighboring pixels where those are nearer to each other than channels.
template <class T> __global__ void __launch_bounds__(stage_threads) stage_chunks_of(const __grid_constant__ Stage s) {
  constexpr int count = sizeof(T) == 1 ? 16 : 8;
  const int64_t pixels = s.images * s.rows * s.columns;
  const int slots = s.parts * s.chunks;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * stage_threads + threadIdx.x;
  if (index >= pixels * slots) return;
  const bool by_pixels = s.stride[3] < s.stride[1];
  const int64_t pixel = by_pixels ? index % pixels : index / slots;
  const auto slot = static_cast<int>(by_pixels ? index / pixels : index % slots);
  const auto column = static_cast<int>(pixel % s.columns), row = static_cast<int>(pixel / s.columns % s.rows);
  const char* image = s.x + pixel / s.columns / s.rows * s.stride[0];
  const int part = slot / s.chunks, taps = s.gathers ? s.kernel[0] * s.kernel[1] : 1;
  const int first_channel = part * (s.part_inputs / taps), first_input = slot % s.chunks * count;
  uint4* to = reinterpret_cast<uint4*>(s.out) + pixel * slots + slot;
  if (sizeof(T) < 4 && s.is_packed) {
    const int y = row - s.padding[0], x = column - s.padding[1];
    const bool is_inside = y >= 0 && y < s.height && x >= 0 && x < s.width;
    const char* at = image + (first_channel + first_input) * s.stride[1] + y * s.stride[2] + x * s.stride[3];
    *to = first_input < s.part_inputs ? load_chunk(s, at, is_inside) : make_uint4(0, 0, 0, 0);
    return;
  }
  using Element = decltype(load_element<T>(s, nullptr));
  Element element[count];
#pragma unroll
  for (int e = 0; e < count; ++e) {
    const int input = first_input + e, tap = input % taps, channel = first_channel + input / taps;
    int y = row - s.padding[0], x = column - s.padding[1];
    if (s.gathers) {
      y = row * s.stride_hw[0] + tap / s.kernel[1] * s.dilation[0] - s.padding[0];
      x = column * s.stride_hw[1] + tap % s.kernel[1] * s.dilation[1] - s.padding[1];
    }
    const bool is_inside = y >= 0 && y < s.height && x >= 0 && x < s.width;
    element[e] = 0;
    if (input < s.part_inputs)
      element[e] = is_inside ? load_element<T>(s, image + channel * s.stride[1] + y * s.stride[2] + x * s.stride[3])
                             : static_cast<Element>(s.pad);
  }
  pack_chunk(s, to, element);
}

// In shared memory a pixel's 4 chunks of a stage lie in a row of 64 bytes, exchanged so that 8 rows' chunks c are in 8
// different groups of banks.
__device__ __forceinline__ int place_chunk(int row, int chunk) { return row * stage_chunks + (chunk ^ (row >> 1 & 3)); }

// What a thread copies: chunk `column` of every stage, for `count` pixels.
template <int count> struct Source {
  int from[count];  // chunk of the first tap; -1: no pixel
  int tap_row, tap_column, chunk, offset;

  // Moves on by a stage.
  __device__ __forceinline__ void advance(const Dense& d) {
    chunk += stage_chunks;
    while (chunk >= d.chunks) {
      chunk -= d.chunks;
      if (++tap_column == d.row_taps) tap_column = 0, ++tap_row;
    }
    offset = tap_row * d.tap_row_step + tap_column * d.tap_step + chunk;
  }

  __device__ __forceinline__ Source(const Dense& d, int first_pixel, int row, int row_step, int column, int group,
                                    int stage) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int pixel = min(first_pixel + row + i * row_step, d.pixels - 1);
      const int image = pixel / d.image_pixels, in_image = pixel % d.image_pixels;
      from[i] = image * d.image_step + in_image / d.row_pixels * d.row_step + in_image % d.row_pixels * d.pixel_step +
                group * d.group_step;
      if (first_pixel + row + i * row_step >= d.pixels) from[i] = -1;
    }
    const int at = stage * stage_chunks + column, tap = at / d.chunks;
    chunk = at % d.chunks - stage_chunks;  // advance() makes up for it
    tap_row = tap / d.row_taps;
    tap_column = tap % d.row_taps;
    advance(d);
  }
};

// A block multiplies `warps` tiles of outputs by 2 * 8 * eights pixels; a warp, one tile by half of the pixels.
template <class T, int bits, int warps, int eights, bool is_segmented> struct Product {
  using Sum = typename T::Sum;
  static constexpr int threads = 2 * warps * warp_size, pixels = 16 * eights, count = T::template lane_words<bits>;
  static constexpr int copies = pixels * stage_chunks / threads, row_step = threads / stage_chunks;
  static constexpr int slot_chunks = T::planes * pixels * stage_chunks;
  static constexpr int depth = depth_of(T::planes);
  static constexpr Shape shape{warps, eights};
  static constexpr int pitch = shape.pitch(), warp_sums = tile_outputs * pitch;
  static constexpr std::size_t shared_bytes = shape.shared_bytes(T::planes);
  static constexpr bool scales = is_segmented || !T::integers;  // sums are scaled on the way
  using Total = std::conditional_t<scales, float, Sum>;

  static __device__ __forceinline__ void copy(const Dense& d, Source<copies>& source, uint4* slot, int row, int column,
                                              bool is_stage) {
    if (is_stage) {
      const bool is_tap = source.tap_row * d.row_taps + source.tap_column < d.taps;
#pragma unroll
      for (int p = 0; p < T::planes; ++p)
#pragma unroll
        for (int i = 0; i < copies; ++i) {
          const bool valid = is_tap && source.from[i] >= 0;
          copy_async(
              slot + p * pixels * stage_chunks + place_chunk(row + i * row_step, column),
              reinterpret_cast<const uint4*>(d.staged) + (valid ? source.from[i] + source.offset + p * d.plane : 0),
              valid);
        }
      source.advance(d);
    }
    copy_commit();  // an empty group keeps the count
  }

  // sum += the products of one stage. Small planes come first.
  static __device__ __forceinline__ void multiply_stage(const Lookup& lookup, const uint32_t (&words)[count],
                                                        const uint4* slot, int first_row, int lane,
                                                        Sum (&sum)[2][eights][4]) {
    const int row = first_row + lane / 16 * 8 + lane % 8, column = lane / 8 % 2;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t a[2][4];
      T::template unpack<bits>(a, words, lookup, step);
#pragma unroll
      for (int p = T::planes - 1; p >= 0; --p)
#pragma unroll
        for (int pair = 0; pair < eights / 2; ++pair) {
          uint32_t b[4];
          load_matrices(b, slot + p * pixels * stage_chunks + place_chunk(row + pair * 16, 2 * step + column));
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int m = 0; m < 2; ++m) T::multiply(sum[m][2 * pair + n], a[m], b[2 * n], b[2 * n + 1]);
        }
    }
  }
};

// total += multiplier * sum, and sum = 0; of a lane's four rows.
template <int eights> __device__ __forceinline__ void promote(float (&total)[2][eights][4], float (&sum)[2][eights][4],
                                                              const float (&multiplier)[4]) {
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < eights; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        total[m][n][i] = fmaf(sum[m][n][i], multiplier[2 * m + i / 2], total[m][n][i]);
        sum[m][n][i] = 0;
      }
}
template <int eights> __device__ __forceinline__ void promote(float (&total)[2][eights][4],
                                                              int32_t (&sum)[2][eights][4], const Output& o,
                                                              const int (&output)[4], int64_t segment, int outputs) {
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < eights; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float y = scale_sum(o, sum[m][n][i], segment * outputs + output[2 * m + i / 2]);
        total[m][n][i] = segment == 0 ? y : __fadd_rn(total[m][n][i], y);
        sum[m][n][i] = 0;
      }
}

template <class T, int bits, int warps, int eights, bool is_segmented>
__global__ void __launch_bounds__(2 * warps * warp_size, 4 / warps) multiply_tiles(const __grid_constant__ Dense d) {
  using P = Product<T, bits, warps, eights, is_segmented>;
  uint4* shared = shared_memory<uint4>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % warp_size, warp = thread / warp_size;
  const int group = static_cast<int>(blockIdx.z) / d.splits, split = static_cast<int>(blockIdx.z) % d.splits;
  const int tile = static_cast<int>(blockIdx.y) * warps + warp % warps, half = warp / warps;
  const int first_pixel = static_cast<int>(blockIdx.x) * P::pixels;
  const int first = static_cast<int>(static_cast<int64_t>(d.stages) * split / d.splits);
  const int last = static_cast<int>(static_cast<int64_t>(d.stages) * (split + 1) / d.splits);

  const int row = thread / stage_chunks, column = thread % stage_chunks;
  Source<P::copies> source(d, first_pixel, row, P::row_step, column, group, first);
#pragma unroll
  for (int s = 0; s < P::depth - 1; ++s) P::copy(d, source, shared + s * P::slot_chunks, row, column, first + s < last);

  // A warp behind the last tile does that one again and writes nothing.
  constexpr int64_t stage_words = P::count * warp_size;
  const uint32_t* from =
      d.weights.words + (static_cast<int64_t>(group) * d.tiles + min(tile, d.tiles - 1)) * d.stages * stage_words;
  const int outputs = d.groups * d.group_outputs;
  int output[4];  // of a lane's rows
#pragma unroll
  for (int i = 0; i < 4; ++i)
    output[i] = group * d.group_outputs + min(tile * tile_outputs + i * 8 + lane / 4, d.group_outputs - 1);
  int segment = first / d.segment_stages, segment_end = (segment + 1) * d.segment_stages;
  float multiplier[4];
  if constexpr (!T::integers)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      multiplier[i] = d.output.multiplier[static_cast<int64_t>(segment) * outputs + output[i]];

  typename P::Sum sum[2][eights][4] = {};
  typename P::Total total[P::scales ? 2 : 1][P::scales ? eights : 1][4] = {};
  uint32_t words[P::count];  // of the next stage
  load_words(words, from + first * stage_words, lane);
  for (int s = first; s < last; ++s) {
    copy_wait<P::depth - 2>();
    barrier();  // the stage is there, and nobody reads the slot that is filled next
    P::copy(d, source, shared + (s - first + P::depth - 1) % P::depth * P::slot_chunks, row, column,
            s + P::depth - 1 < last);
    uint32_t now[P::count];
#pragma unroll
    for (int i = 0; i < P::count; ++i) now[i] = words[i];
    if (s + 1 < last) load_words(words, from + (s + 1) * stage_words, lane);
    const uint4* slot = shared + (s - first) % P::depth * P::slot_chunks;
    P::multiply_stage(d.weights.lookup[0], now, slot, half * 8 * eights, lane, sum);
    for (int term = 1; term < d.weights.terms; ++term) {  // of levels that are no 16-bit numbers
      if constexpr (bits == 16) load_words(now, from + term * d.weights.term_words + s * stage_words, lane);
      P::multiply_stage(d.weights.lookup[term], now, slot, half * 8 * eights, lane, sum);
    }
    const bool ends = s + 1 == segment_end || s + 1 == last;
    if constexpr (!T::integers) {
      // Every 64 inputs, or 32 of several terms: the matrix unit truncates, most where all products have one sign.
      if (ends || (s - first) % 2 || d.weights.terms > 1) promote<eights>(total, sum, multiplier);
    } else if constexpr (is_segmented) {
      if (ends) promote<eights>(total, sum, d.output, output, segment, outputs);
    }
    if (ends && s + 1 < last) {
      ++segment;
      segment_end += d.segment_stages;
      if constexpr (!T::integers)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          multiplier[i] = d.output.multiplier[static_cast<int64_t>(segment) * outputs + output[i]];
    }
  }

  // Through shared memory, so that neighboring lanes write neighboring pixels, or outputs where those are nearer.
  copy_wait<0>();
  barrier();
  auto* sums = reinterpret_cast<typename P::Total*>(shared) + warp * P::warp_sums;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < eights; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        typename P::Total& to = sums[(16 * m + i / 2 * 8 + lane / 4) * P::pitch + n * 8 + lane % 4 * 2 + i % 2];
        if constexpr (P::scales) to = total[m][n][i];
        else to = sum[m][n][i];
      }
  warp_barrier();
  const bool by_outputs = d.splits == 1 && d.output.out_stride[1] < d.output.out_stride[3];
  constexpr int warp_pixels = 8 * eights;
  for (int i = 0; i < warp_pixels; ++i) {
    const int index = i * warp_size + lane;
    const int in_tile = by_outputs ? lane : index / warp_pixels, in_half = by_outputs ? i : index % warp_pixels;
    const int in_group = tile * tile_outputs + in_tile, pixel = first_pixel + half * warp_pixels + in_half;
    if (in_group >= d.group_outputs || pixel >= d.pixels) continue;
    const int o = group * d.group_outputs + in_group;
    const typename P::Total y = sums[in_tile * P::pitch + in_half];
    if (d.splits > 1) {
      reinterpret_cast<typename P::Total*>(d.partial)[(static_cast<int64_t>(split) * outputs + o) * d.pixels + pixel] =
          y;
      continue;
    }
    const int64_t out_at = pixel_offset(d.output.out_stride, pixel, d.image_pixels, d.row_pixels);
    const int64_t residual_at = pixel_offset(d.output.residual_stride, pixel, d.image_pixels, d.row_pixels);
    if constexpr (P::scales) finish_scaled(d.output, y, o, out_at, residual_at);
    else finish(d.output, y, o, out_at, residual_at);
  }
}

// The sum of the splits, in their order. A thread finishes an output of a pixel.
template <class Sum> __global__ void __launch_bounds__(stage_threads) add_splits(const __grid_constant__ Dense d) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * stage_threads + threadIdx.x;
  const int64_t count = static_cast<int64_t>(d.groups) * d.group_outputs * d.pixels;
  if (index >= count) return;
  const Sum* from = reinterpret_cast<const Sum*>(d.partial) + index;
  Sum sum = from[0];
  for (int s = 1; s < d.splits; ++s) sum += from[s * count];
  const auto pixel = static_cast<int>(index % d.pixels), output = static_cast<int>(index / d.pixels);
  finish(d.output, sum, output, pixel_offset(d.output.out_stride, pixel, d.image_pixels, d.row_pixels),
         pixel_offset(d.output.residual_stride, pixel, d.image_pixels, d.row_pixels));
}

template <class T, int bits, int warps, int eights, bool is_segmented>
void launch_tiles(const Dense& d, cudaStream_t stream) {
  using P = Product<T, bits, warps, eights, is_segmented>;
  const dim3 grid(blocks_of(d.pixels, P::pixels), blocks_of(d.tiles, warps),
                  static_cast<unsigned>(d.groups) * static_cast<unsigned>(d.splits));
  launch(multiply_tiles<T, bits, warps, eights, is_segmented>, grid, P::threads, P::shared_bytes, stream, d);
  if (d.splits == 1) return;
  const int64_t count = static_cast<int64_t>(d.groups) * d.group_outputs * d.pixels;
  launch(add_splits<typename P::Sum>, blocks_of(count, stage_threads), stage_threads, 0, stream, d);
}

template <class T, int bits> void launch_bits(const Dense& d, const Shape& shape, cudaStream_t stream) {
  if (T::integers && d.segment_stages < d.stages && d.output.epilogue.out_dtype != DType::i32)
    return launch_tiles<T, bits, 2, 4, T::integers>(d, stream);
  if constexpr (fits_registers(T::planes, bits)) {
    if (shape.warps == 4) return launch_tiles<T, bits, 4, 8, false>(d, stream);
    if (shape.eights == 8) return launch_tiles<T, bits, 2, 8, false>(d, stream);
  }
  launch_tiles<T, bits, 2, 4, false>(d, stream);
}

struct MultiplyTiles {
  const Dense& d;
  const Shape& shape;
  cudaStream_t stream;
  template <class T, int bits> void run() const { launch_bits<T, bits>(d, shape, stream); }
};
}  // namespace

void stage(const Stage& s, void* stream) {
  const int64_t chunks = s.images * s.rows * s.columns * s.parts * s.chunks;
  const unsigned blocks = blocks_of(chunks, stage_threads);
  const auto kernel = s.dtype == DType::f32        ? stage_chunks_of<float>
                      : element_bytes(s.dtype) > 1 ? stage_chunks_of<uint16_t>
                      : s.dtype == DType::u8       ? stage_chunks_of<uint8_t>
                                                   : stage_chunks_of<int8_t>;
  launch(kernel, blocks, stage_threads, 0, static_cast<cudaStream_t>(stream), s);
}

void multiply(const Dense& d, const Shape& shape, void* stream) {
  by_codes(d.dtype, d.weights.bits, MultiplyTiles{d, shape, static_cast<cudaStream_t>(stream)});
}

int compiled_capability() {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, stage_chunks_of<float>));
  return attributes.ptxVersion;
}

}  // namespace pycodesign::repetition::cuda

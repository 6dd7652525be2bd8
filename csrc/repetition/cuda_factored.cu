// Factored sums on CUDA cores, as UCNN and Q-gym have them: the inputs of an output in patterns of a few; for each
// pattern that occurs, up to sign, the partial sum of a pixel is computed once, into shared memory, and every output
// adds one of them.
#include <cstddef>
#include <type_traits>

#include "core/warp.cuh"
#include "repetition/cuda_finish.cuh"
#include "repetition/cuda_kernels.h"

namespace pycodesign::repetition::cuda {
namespace {

using namespace core::cuda;

constexpr int warps = factored_outputs / factored_lane_outputs;

// Input `i` of an output, in the order of the weights (c, r, s), of a lane's pixel; padding is zero.
template <class T> __device__ __forceinline__ T load_input(const Factored& f, const char* image, int y, int x, int i) {
  const int taps = f.kernel[0] * f.kernel[1], tap = i % taps;
  const int row = y + tap / f.kernel[1] * f.dilation[0], column = x + tap % f.kernel[1] * f.dilation[1];
  if (i >= f.inputs || row < 0 || row >= f.height || column < 0 || column >= f.width) return 0;
  const char* at = image + i / taps * f.stride[1] + row * f.stride[2] + column * f.stride[3];
  if constexpr (std::is_same_v<T, float>) return load_float(f.dtype, at);
  const int value = f.dtype == DType::u8 ? *reinterpret_cast<const uint8_t*>(at) : *reinterpret_cast<const int8_t*>(at);
  return static_cast<T>(value - f.zero_point);
}

template <class T> __device__ __forceinline__ T multiply_add(T a, T b, T c) { return a * b + c; }
template <> __device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

// A lane is a pixel; a warp has 16 outputs, whose codes of a unit are one load. Tables of several units at a time.
template <class T> __global__ void __launch_bounds__(warps* warp_size, 2)
    add_factored(const __grid_constant__ Factored f) {
  T* inputs = shared_memory<T>();                         // [unit][input of the pattern][lane]
  T* table = inputs + f.at_once * f.pattern * warp_size;  // [unit][entry][lane]
  const int lane = static_cast<int>(threadIdx.x) % warp_size, warp = static_cast<int>(threadIdx.x) / warp_size;
  const int group = static_cast<int>(blockIdx.z), block = static_cast<int>(blockIdx.y);
  const int pixel = static_cast<int>(blockIdx.x) * warp_size + lane, clamped = min(pixel, f.pixels - 1);
  const int in_image = clamped % f.image_pixels;
  const int y = in_image / f.row_pixels * f.stride_hw[0] - f.padding[0];
  const int x = in_image % f.row_pixels * f.stride_hw[1] - f.padding[1];
  const char* image =
      f.x + clamped / f.image_pixels * f.stride[0] + group * (f.inputs / f.kernel[0] / f.kernel[1]) * f.stride[1];
  const T* digits = static_cast<const T*>(f.digits) + static_cast<int64_t>(group) * f.units * f.entries * f.pattern;
  const unsigned char* codes = f.codes + (static_cast<int64_t>(group) * f.blocks + block) * f.units * factored_outputs +
                               warp * factored_lane_outputs;

  T sum[factored_lane_outputs] = {};
  for (int first = 0; first < f.units; first += f.at_once) {
    const int units = min(f.at_once, f.units - first);
    for (int i = warp; i < units * f.pattern; i += warps)
      inputs[i * warp_size + lane] = load_input<T>(f, image, y, x, first * f.pattern + i);
    barrier();  // inputs are there, and nobody reads the tables before
    for (int i = warp; i < units * f.entries; i += warps) {
      const T* digit = digits + (static_cast<int64_t>(first) * f.entries + i) * f.pattern;
      const T* input = inputs + i / f.entries * f.pattern * warp_size + lane;
      T entry = 0;
      for (int k = 0; k < f.pattern; ++k) entry = multiply_add(__ldg(digit + k), input[k * warp_size], entry);
      table[i * warp_size + lane] = entry;
    }
    barrier();
    for (int u = 0; u < units; ++u) {
      const uint4 code =
          __ldg(reinterpret_cast<const uint4*>(codes + (first + u) * static_cast<int64_t>(factored_outputs)));
      const uint32_t words[4] = {code.x, code.y, code.z, code.w};
      const T* entries = table + u * f.entries * warp_size + lane;
#pragma unroll
      for (int o = 0; o < factored_lane_outputs; ++o) {
        const uint32_t byte = words[o / 4] >> o % 4 * 8;
        const T entry = entries[(byte & 127) * warp_size];
        sum[o] += byte & 128 ? -entry : entry;
      }
    }
  }
  if (pixel >= f.pixels) return;
  const int64_t out_at = pixel_offset(f.output.out_stride, pixel, f.image_pixels, f.row_pixels);
  const int64_t residual_at = pixel_offset(f.output.residual_stride, pixel, f.image_pixels, f.row_pixels);
#pragma unroll
  for (int o = 0; o < factored_lane_outputs; ++o) {
    const int in_group = block * factored_outputs + warp * factored_lane_outputs + o;
    if (in_group >= f.group_outputs) continue;
    const int output = group * f.group_outputs + in_group;
    if constexpr (std::is_same_v<T, float>) {
      const float y_scaled = __fmul_rn(sum[o], f.output.multiplier[output]);
      finish_scaled(f.output, y_scaled, output, out_at, residual_at);
    } else {
      finish(f.output, sum[o], output, out_at, residual_at);
    }
  }
}

}  // namespace

void add_patterns(const Factored& f, void* stream) {
  const dim3 grid(static_cast<unsigned>((f.pixels + warp_size - 1) / warp_size), static_cast<unsigned>(f.blocks),
                  static_cast<unsigned>(f.groups));
  const std::size_t shared = static_cast<std::size_t>(f.at_once) * (f.pattern + f.entries) * warp_size * 4;
  const auto kernel = is_float(f.dtype) ? add_factored<float> : add_factored<int32_t>;
  launch(kernel, grid, warps * warp_size, shared, static_cast<cudaStream_t>(stream), f);
}

}  // namespace pycodesign::repetition::cuda

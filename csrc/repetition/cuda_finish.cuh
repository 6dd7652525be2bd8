// From sums to outputs: the epilogue, in one order, every step rounded to float32 and none contracted.
#pragma once

#include "core/half.cuh"
#include "core/launch.cuh"
#include "repetition/cuda_kernels.h"

namespace pycodesign::repetition::cuda {

__device__ __forceinline__ float load_float(DType dtype, const char* at) {
  if (dtype == DType::f32) return *reinterpret_cast<const float*>(at);
  if (dtype == DType::f16) return core::from_float16(*reinterpret_cast<const uint16_t*>(at));
  if (dtype == DType::bf16) return core::from_bfloat16(*reinterpret_cast<const uint16_t*>(at));
  if (dtype == DType::u8) return static_cast<float>(*reinterpret_cast<const uint8_t*>(at));
  return static_cast<float>(*reinterpret_cast<const int8_t*>(at));
}

// y is scaled already.
__device__ __forceinline__ void finish_scaled(const Output& o, float y, int output, int64_t out_at,
                                              int64_t residual_at) {
  const Epilogue& e = o.epilogue;
  if (o.bias) y = __fadd_rn(y, o.bias[output]);
  if (e.has_residual) {
    const float r = load_float(e.residual_dtype, o.residual + residual_at + output * o.residual_stride[1]);
    y = __fadd_rn(y, __fmul_rn(e.residual_scale, __fsub_rn(r, e.residual_zero_point)));
  }
  if (e.has_lo) y = y < e.lo ? e.lo : y;  // keeps NaN
  if (e.has_hi) y = y > e.hi ? e.hi : y;
  char* to = o.out + out_at + output * o.out_stride[1];
  if (e.out_dtype == DType::f32) {
    *reinterpret_cast<float*>(to) = y;
    return;
  }
  if (e.out_dtype == DType::f16 || e.out_dtype == DType::bf16) {
    *reinterpret_cast<uint16_t*>(to) = e.out_dtype == DType::f16 ? core::to_float16(y) : core::to_bfloat16(y);
    return;
  }
  const float lowest = static_cast<float>((e.out_dtype == DType::i8 ? -128 : 0) - e.out_zero_point);
  float v = __fdiv_rn(y, e.out_scale);
  v = v > lowest ? v : lowest;  // of NaN, too
  v = v < lowest + 255.0f ? v : lowest + 255.0f;
  *to = static_cast<char>(__float2int_rn(v) + e.out_zero_point);
}

__device__ __forceinline__ float scale_sum(const Output& o, int32_t sum, int64_t at) {
  const auto corrected = static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(o.correction[at]));
  return __fmul_rn(static_cast<float>(corrected), o.multiplier[at]);
}

__device__ __forceinline__ void finish(const Output& o, int32_t sum, int output, int64_t out_at, int64_t residual_at) {
  if (o.epilogue.out_dtype == DType::i32)
    *reinterpret_cast<uint32_t*>(o.out + out_at + output * o.out_stride[1]) =
        static_cast<uint32_t>(sum) + static_cast<uint32_t>(o.total_correction[output]);
  else finish_scaled(o, scale_sum(o, sum, output), output, out_at, residual_at);
}
__device__ __forceinline__ void finish(const Output& o, float y, int output, int64_t out_at, int64_t residual_at) {
  finish_scaled(o, y, output, out_at, residual_at);
}

// Where a pixel is in a tensor whose strides are (N, O, H, W).
__device__ __forceinline__ int64_t pixel_offset(const int64_t (&stride)[4], int pixel, int image_pixels,
                                                int row_pixels) {
  const int image = pixel / image_pixels, in_image = pixel % image_pixels;
  return image * stride[0] + in_image / row_pixels * stride[2] + in_image % row_pixels * stride[3];
}

}  // namespace pycodesign::repetition::cuda

// 16-bit floats and float32 as a GPU converts them: rounded to nearest even, NaN stays NaN. core/half.h does it where
// there is none.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace pycodesign::core {

__device__ __forceinline__ float from_float16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t to_float16(float value) { return __half_as_ushort(__float2half_rn(value)); }
__device__ __forceinline__ float from_bfloat16(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
__device__ __forceinline__ uint16_t to_bfloat16(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

}  // namespace pycodesign::core

#else
#include "core/half.h"
#endif

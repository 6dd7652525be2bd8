// What threads do together: barriers, asynchronous copies, products of matrix fragments. Everything here is
// called by all 32 lanes of a warp at once (barrier: by all threads of a block), but for the copies.
//
// Fragments are those of the PTX manual. Of lane l, with g = l / 4 and t = l % 4, a register holds n consecutive k (4
// bytes, or 2 halves), and C is (16, 8):
//   A (16, 8 n)   a[0] row g, k = n t ..    a[1] row g + 8    a[2], a[3] the same rows, k + 4 n
//   B (8 n, 8)    b[0] k = n t .., column g    b[1] k + 4 n
//   C             c[0], c[1] row g, columns 2 t, 2 t + 1    c[2], c[3] row g + 8
#pragma once

#include <cstdint>

#include "core/launch.cuh"

namespace pycodesign::core::cuda {

inline constexpr int warp_size = 32;

#ifdef __CUDACC__

__device__ __forceinline__ void barrier() { __syncthreads(); }
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

// 16 bytes from device to shared memory, zeros where not `valid`; both addresses are aligned to 16. Groups of copies
// arrive in order: copy_wait<n> leaves the n youngest groups of this thread under way. A barrier shows them to others.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}
__device__ __forceinline__ void copy_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}
template <int n> __device__ __forceinline__ void copy_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(n) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit elements (or 8x16 of bytes) in shared memory: lane l names row l % 8 of matrix l / 8, 16
// bytes; word[m] is word l % 4 of row l / 4 of matrix m.
__device__ __forceinline__ void load_matrices(uint32_t (&word)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(address)
               : "memory");
}

// c += a b, exact sums of signed bytes, k = 32.
__device__ __forceinline__ void multiply_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
#pragma unroll
  for (int part = 0; part < 4; ++part)  // rows of part % 2, k of part / 2
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};\n"
        : "+r"(c[part % 2 * 2]), "+r"(c[part % 2 * 2 + 1])
        : "r"(a[part]), "r"(part < 2 ? b0 : b1));
#endif
}

// c += a b with k = 16, products exact, sums truncated by the matrix unit.
__device__ __forceinline__ void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
      "%2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __trap();  // capability 7.5 has no bfloat16: callers say so before they start a kernel
#endif
}
__device__ __forceinline__ void multiply_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
#pragma unroll
  for (int half = 0; half < 2; ++half)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(half ? b1 : b0));
#endif
}

#else

inline void barrier() { emulated::block_barrier(); }
inline void warp_barrier() { emulated::gather("warp_barrier", 0); }
inline void copy_async(void* to, const void* from, bool valid) { emulated::copy_async(to, from, valid); }
inline void copy_commit() { emulated::copy_commit(); }
template <int n> void copy_wait() { emulated::copy_wait(n); }
inline void load_matrices(uint32_t (&word)[4], const void* row) { emulated::load_matrices(word, row); }
inline void multiply_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::multiply_s8(c, a, b0, b1);
}
inline void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::multiply_16(c, a, b0, b1, from_bfloat16);
}
inline void multiply_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::multiply_16(c, a, b0, b1, from_float16);
}

#endif

}  // namespace pycodesign::core::cuda

// Enough of CUDA for a plain C++ compiler to build the .cu sources and run them on the CPU, to test them where there is
// no GPU. Blocks run one after another. The threads of a block are fibers that change places at barriers and warp
// collectives, in an order drawn from a seed, so that a missing barrier gives wrong results. Also found: threads that
// meet at different collectives or wait forever (std::logic_error), writes behind dynamic shared memory, reads of
// asynchronous copies before the wait, __ldg of unaligned addresses, and with sanitizers what those find.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "core/half.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static thread_local  // one block at a time
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// The runtime: one device, whose memory is the host's and whose streams finish at once.
enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation };
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
using cudaStream_t = struct EmulatedStream*;
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "out of memory" : "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
struct cudaFuncAttributes {
  int ptxVersion;
};
template <class Kernel> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  return attributes->ptxVersion = 90, cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  constexpr int values[] = {132, 9, 0, 227 << 10};  // of an H200
  return *value = values[attribute], cudaSuccess;
}
template <class T> cudaError_t cudaMalloc(T** pointer, std::size_t bytes) {
  *pointer = static_cast<T*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* pointer) { return std::free(pointer), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}

// Arithmetic of one thread.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float __int_as_float(int32_t bits) { return std::bit_cast<float>(bits); }
inline int32_t __float_as_int(float value) { return std::bit_cast<int32_t>(value); }
inline int __float2int_rn(float value) { return static_cast<int>(std::nearbyintf(value)); }
uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector);
int __dp4a(int a, int b, int c);
namespace pycodesign::core::cuda::emulated {
void check_aligned(const void* pointer, std::size_t bytes);
}
template <class T> T __ldg(const T* pointer) {
  pycodesign::core::cuda::emulated::check_aligned(pointer, sizeof(T));
  return *pointer;
}
template <class T> T __ldcs(const T* pointer) { return *pointer; }
template <class T> void __stcs(T* pointer, T value) { *pointer = value; }
template <class T> T atomicAdd(T* pointer, T value) {
  const T old = *pointer;
  *pointer = old + value;
  return old;
}
inline void __threadfence() {}
using std::max, std::min;

namespace pycodesign::core::cuda {

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

namespace emulated {

void set_seed(uint64_t seed);  // of the order in which threads run
void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& thread);

// Called by fibers.
int lane();
unsigned char* shared_bytes();
void block_barrier();
const void* gather_bytes(const char* what, const void* mine, std::size_t bytes);  // of all lanes, one after another
void copy_async(void* to, const void* from, bool valid);
void copy_commit();
void copy_wait(int groups);

// The values of all 32 lanes, until the warp's next collective but one.
template <class T> const T* gather(const char* what, const T& mine) {
  return static_cast<const T*>(gather_bytes(what, &mine, sizeof mine));
}

// What core/warp.cuh says of them.
void load_matrices(uint32_t (&word)[4], const void* row);
void multiply_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void multiply_16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*to_float)(uint16_t));

}  // namespace emulated

template <class... Parameters, class... Arguments> void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                                                               std::size_t shared_bytes, cudaStream_t,
                                                               Arguments... arguments) {
  emulated::run(grid, block, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); });
}

template <class T> T* shared_memory() { return reinterpret_cast<T*>(emulated::shared_bytes()); }

}  // namespace pycodesign::core::cuda

// Kernels start here and nowhere else, so that the same sources also run without a GPU: a compiler other than nvcc
// takes the types, the runtime and the threads of a block from tests/cpp/emulated_cuda.h.
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace pycodesign::core::cuda {

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would report it, too
  std::string text = std::string("CUDA: ") + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice)
    text += "; build for this GPU with -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native";
  throw std::runtime_error(text);
}

// Lets blocks of a kernel without other shared memory have as much as there is: the same for every call, since other
// threads may start the kernel, too.
template <class Kernel> void allow_shared_memory(Kernel* kernel) {
  int device = 0, most = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
}

// Queues kernel(args...) on the stream. More than 48 KiB of shared memory a block are asked for on the way.
template <class... Parameters, class... Arguments> void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                                                               std::size_t shared_bytes, cudaStream_t stream,
                                                               Arguments... arguments) {
  if (shared_bytes > 48 << 10) allow_shared_memory(kernel);
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  check(cudaGetLastError());
}

// The block's dynamic shared memory, aligned for every vector type.
template <class T> __device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  return reinterpret_cast<T*>(dynamic_shared);
}

}  // namespace pycodesign::core::cuda

#else
#include "emulated_cuda.h"
#endif

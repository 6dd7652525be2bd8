// Floor: bytes of w and of the result over the memory's bandwidth. A thread owns 16 bytes of a row of the result, finds
// out where they come from once, and writes them in several rows: 16-byte stores side by side, whatever the columns.
#include "growth/cuda.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "core/divide.h"
#include "core/half.cuh"
#include "core/launch.cuh"

namespace pycodesign::growth::cuda {
namespace {

constexpr int chunk_bytes = 16, warp_threads = 32, block_threads = 256;
constexpr int batch = 4;               // rows whose loads are under way before the first store
constexpr int64_t many_blocks = 8192;  // from which a thread writes several batches

// How an element is stored, and as what it is multiplied, if it is.
template <class T> struct Copied {
  using Stored = T;
  static constexpr bool is_scaled = false;
  using Value = T;
};
template <class T> struct Same {
  using Stored = T;
  using Value = T;
  static constexpr bool is_scaled = true;
  static __device__ __forceinline__ T load(T stored) { return stored; }
  static __device__ __forceinline__ T store(T value) { return value; }
};
struct Float16 {
  using Stored = uint16_t;
  using Value = float;
  static constexpr bool is_scaled = true;
  static __device__ __forceinline__ float load(uint16_t bits) { return core::from_float16(bits); }
  static __device__ __forceinline__ uint16_t store(float value) { return core::to_float16(value); }
};
struct BFloat16 {
  using Stored = uint16_t;
  using Value = float;
  static constexpr bool is_scaled = true;
  static __device__ __forceinline__ float load(uint16_t bits) { return core::from_bfloat16(bits); }
  static __device__ __forceinline__ uint16_t store(float value) { return core::to_bfloat16(value); }
};

template <class T> struct alignas(chunk_bytes) Chunk {
  static constexpr int width = chunk_bytes / static_cast<int>(sizeof(T));
  T element[width];
};

// Rows of the result in elements, trailing dimensions included; strides in bytes.
struct Rows {
  const char* w;
  int64_t shape[4], stride[4];
  const int64_t *out_index, *in_index;
  const void *in_scale, *out_scale;
  char* out;
  int64_t rows, elements, row_stride;
  int phases;  // rows r and r + phases lie alike within 16 bytes
  int batches;
};

// Where the elements [first, first + width) of a row come from: bytes from the beginning of the source row.
template <class E> struct Sources {
  static constexpr int width = Chunk<typename E::Stored>::width;
  int64_t from[width];
  typename E::Value scale[width];
  unsigned is_there;  // bit v: neither zero nor outside of the row
  bool is_chunk;      // 16 bytes in a piece, aligned in every row
};

template <class E> __device__ __forceinline__ Sources<E> find_sources(const Rows& x, int64_t first) {
  using Stored = typename E::Stored;
  Sources<E> s;
  s.is_there = 0;
  const auto inner = static_cast<uint32_t>(x.shape[2] * x.shape[3]), last = static_cast<uint32_t>(x.shape[3]);
  const uint32_t begin = first < 0 ? 0 : static_cast<uint32_t>(first);
  uint32_t column = begin / inner, i = begin % inner / last, j = begin % inner % last;
#pragma unroll
  for (int v = 0; v < s.width; ++v) {
    s.from[v] = 0;
    if constexpr (E::is_scaled) s.scale[v] = 1;
    const int64_t element = first + v;
    if (element < 0 || element >= x.elements) continue;
    const int64_t index = x.in_index ? __ldg(x.in_index + column) : column;
    if (index >= 0 && index < x.shape[1]) {
      s.is_there |= 1u << v;
      s.from[v] = index * x.stride[1] + i * x.stride[2] + j * x.stride[3];
    }
    if constexpr (E::is_scaled)
      if (x.in_scale) s.scale[v] = __ldg(static_cast<const typename E::Value*>(x.in_scale) + column);
    if (++j == last) {
      j = 0;
      if (++i == static_cast<uint32_t>(x.shape[2])) {
        i = 0;
        ++column;
      }
    }
  }
  const auto address = reinterpret_cast<uintptr_t>(x.w + s.from[0]);
  s.is_chunk = s.is_there == (1u << s.width) - 1 && address % chunk_bytes == 0 && x.stride[0] % chunk_bytes == 0;
#pragma unroll
  for (int v = 1; v < s.width; ++v) s.is_chunk &= s.from[v] == s.from[0] + v * static_cast<int64_t>(sizeof(Stored));
  return s;
}

template <class E>
__device__ __forceinline__ Chunk<typename E::Stored> load_chunk(const char* row, const Sources<E>& s) {
  using Stored = typename E::Stored;
  Chunk<Stored> chunk{};
  if (!row) return chunk;
  if (s.is_chunk) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(row + s.from[0]));
    __builtin_memcpy(&chunk, &bits, chunk_bytes);
    return chunk;
  }
#pragma unroll
  for (int v = 0; v < s.width; ++v)
    if (s.is_there >> v & 1) chunk.element[v] = __ldg(reinterpret_cast<const Stored*>(row + s.from[v]));
  return chunk;
}

template <class E> __device__ __forceinline__ void store_chunk(const Rows& x, char* to, int64_t first,
                                                               const Chunk<typename E::Stored>& chunk) {
  using Stored = typename E::Stored;
  if (first >= 0 && first + chunk.width <= x.elements) {
    uint4 bits;
    __builtin_memcpy(&bits, &chunk, chunk_bytes);
    __stcs(reinterpret_cast<uint4*>(to), bits);
    return;
  }
#pragma unroll
  for (int v = 0; v < chunk.width; ++v)
    if (first + v >= 0 && first + v < x.elements) reinterpret_cast<Stored*>(to)[v] = chunk.element[v];
}

// Of a multiprocessor; more would leave too few registers.
template <class E> constexpr int blocks_at_once() {
  return sizeof(typename E::Stored) < 4 ? 2 : sizeof(typename E::Stored) == 4 ? 4 : 3;
}

// Block (x, y): y rows at once, x chunks of them. Grid: chunks, batches of rows, phases.
template <class E> __global__ void __launch_bounds__(block_threads, blocks_at_once<E>())
    expand_rows(const __grid_constant__ Rows x) {
  using Stored = typename E::Stored;
  using Value = typename E::Value;
  constexpr int width = Chunk<Stored>::width;
  const int64_t phase = blockIdx.z;
  const auto start = reinterpret_cast<uintptr_t>(x.out + phase * x.row_stride);
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t first = chunk * width - static_cast<int64_t>(start % chunk_bytes / sizeof(Stored));
  if (first >= x.elements) return;
  const Sources<E> sources = find_sources<E>(x, first);
  const int64_t step = static_cast<int64_t>(blockDim.y) * x.phases;  // from one row of a thread to the next
  int64_t r = phase + (static_cast<int64_t>(blockIdx.y) * x.batches * batch * blockDim.y + threadIdx.y) * x.phases;
  for (int b = 0; b < x.batches; ++b, r += batch * step) {
    Chunk<Stored> chunks[batch];
    Value scale[batch];
    unsigned is_there[batch];  // elements that are neither zero nor outside
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      const int64_t row = r + k * step;
      const bool is_row = row < x.rows;
      const int64_t index = !is_row ? -1 : x.out_index ? __ldg(x.out_index + row) : row;
      const bool is_source = index >= 0 && index < x.shape[0];
      chunks[k] = load_chunk<E>(is_source ? x.w + index * x.stride[0] : nullptr, sources);
      is_there[k] = is_source ? sources.is_there : 0;
      if constexpr (E::is_scaled)
        scale[k] = is_source && x.out_scale ? __ldg(static_cast<const Value*>(x.out_scale) + row) : Value(1);
    }
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      const int64_t row = r + k * step;
      if (row >= x.rows) return;
      if constexpr (E::is_scaled)
#pragma unroll
        for (int v = 0; v < width; ++v)
          if (is_there[k] >> v & 1)  // zero times infinity is none
            chunks[k].element[v] = E::store(E::load(chunks[k].element[v]) * sources.scale[v] * scale[k]);
      store_chunk<E>(x, x.out + row * x.row_stride + first * static_cast<int64_t>(sizeof(Stored)), first, chunks[k]);
    }
  }
}

using core::divide_up;

template <class E> void launch(Rows x, void* stream) {
  constexpr int width = Chunk<typename E::Stored>::width;
  const int64_t chunks =
      divide_up(x.elements + (x.phases > 1 || reinterpret_cast<uintptr_t>(x.out) % chunk_bytes ? width - 1 : 0), width);
  unsigned across = 1;
  while (across < warp_threads && across < chunks) across *= 2;
  const unsigned down = block_threads / across;
  const int64_t groups = divide_up(divide_up(x.rows, x.phases), static_cast<int64_t>(down) * batch);
  const int64_t blocks = divide_up(chunks, across) * x.phases;
  x.batches = static_cast<int>(std::max<int64_t>(divide_up(groups, 65535), groups * blocks > many_blocks ? 4 : 1));
  const dim3 grid(static_cast<unsigned>(divide_up(chunks, across)), static_cast<unsigned>(divide_up(groups, x.batches)),
                  static_cast<unsigned>(x.phases));
  core::cuda::launch(expand_rows<E>, grid, dim3(across, down), 0, static_cast<cudaStream_t>(stream), x);
}

}  // namespace

void expand(const Expansion& x, void* stream) {
  Rows rows{};
  rows.w = x.w;
  std::copy(x.shape.begin(), x.shape.end(), rows.shape);
  std::copy(x.stride.begin(), x.stride.end(), rows.stride);
  rows.out_index = x.out_index;
  rows.in_index = x.in_index;
  rows.in_scale = x.in_scale;
  rows.out_scale = x.out_scale;
  rows.out = x.out;
  rows.rows = x.rows;
  rows.elements = x.columns * x.shape[2] * x.shape[3];
  rows.row_stride = x.row_stride;
  rows.phases = static_cast<int>(chunk_bytes / std::gcd(std::abs(x.row_stride), int64_t{chunk_bytes}));
  if (x.rows < rows.phases) rows.phases = static_cast<int>(std::max<int64_t>(x.rows, 1));
  if (rows.elements >= int64_t{1} << 31)
    throw std::invalid_argument("w: expected rows of fewer than 2^31 elements, got " + std::to_string(rows.elements));
  if (x.rows == 0 || rows.elements == 0) return;
  switch (x.dtype) {
    case DType::bytes1: return launch<Copied<uint8_t>>(rows, stream);
    case DType::bytes2: return launch<Copied<uint16_t>>(rows, stream);
    case DType::bytes4: return launch<Copied<uint32_t>>(rows, stream);
    case DType::bytes8: return launch<Copied<unsigned long long>>(rows, stream);
    case DType::f16: return launch<Float16>(rows, stream);
    case DType::bf16: return launch<BFloat16>(rows, stream);
    case DType::f32: return launch<Same<float>>(rows, stream);
    case DType::f64: return launch<Same<double>>(rows, stream);
  }
}

}  // namespace pycodesign::growth::cuda

// Floor: bytes of z and base over the memory's bandwidth; for few tokens those of the deltas. A block has one task and
// a few tokens, whose x it keeps in shared memory, and goes through blocks of 256 outputs: a thread sums two of them
// for all of its tokens, in the order in which the CPU's kernels do.
#include "sharing/cuda.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "core/divide.h"
#include "core/half.cuh"
#include "core/launch.cuh"
#include "core/warp.cuh"

namespace pycodesign::sharing::cuda {
namespace {

constexpr int threads = 128, rows_apart = 128;  // outputs of a thread: its number, and that plus rows_apart
constexpr int block_groups = block_rows / group_rows;
constexpr size_t most_tasks = 32;  // of a launch, whose arguments have at most 4 KB
constexpr int64_t blocks_per_multiprocessor = 2;

static_assert(2 * rows_apart == block_rows && block_groups == 2 * threads / group_rows);

struct Arguments {
  Task task[most_tasks];
  int64_t tokens, outputs, inputs;
  unsigned chunks;  // of outputs
  const float* x;
  int64_t x_task, x_row;
  const int64_t* positions;
  const float* base;
  int64_t base_task, base_row;
  float* z;
  int64_t z_task, z_row;
};

__device__ __forceinline__ float load_value(const float* value) { return __ldg(value); }
__device__ __forceinline__ float load_value(const uint16_t* value) { return core::from_bfloat16(__ldg(value)); }

template <int T> struct alignas(T < 4 ? T * sizeof(float) : 16) Tokens {
  float value[T];
};

// T tokens of every input, side by side; a T of 0 stands for one token that is read where it lies.
template <int T> struct Tile {
  static constexpr int tokens = T;
  const float* data;
  __device__ __forceinline__ float read(int64_t input, int token) const { return data[input * T + token]; }
  __device__ __forceinline__ Tokens<T> read(int64_t input) const {
    return reinterpret_cast<const Tokens<T>*>(data)[input];
  }
};
template <> struct Tile<0> {
  static constexpr int tokens = 1;
  const float* data;
  int64_t inputs;
  __device__ __forceinline__ float read(int64_t input, int) const { return input < inputs ? __ldg(data + input) : 0; }
  __device__ __forceinline__ Tokens<1> read(int64_t input) const { return {{read(input, 0)}}; }
};

__device__ __forceinline__ int64_t find_row(const Arguments& a, int64_t token) {
  return a.positions ? __ldg(a.positions + token) : token;
}

// Behind the last input lies a zero, which places of a group that are over read.
template <int T> __device__ __forceinline__ void stage_tokens(const Arguments& a, int64_t first, float* tile) {
  const float* x = a.x + blockIdx.y * a.x_task;
  int64_t row[T];
#pragma unroll
  for (int t = 0; t < T; ++t) row[t] = first + t < a.tokens ? find_row(a, first + t) : -1;
  for (int64_t i = threadIdx.x; i <= a.inputs; i += threads) {
    Tokens<T> read;
#pragma unroll
    for (int t = 0; t < T; ++t) read.value[t] = row[t] >= 0 && i < a.inputs ? __ldg(x + row[t] * a.x_row + i) : 0;
    reinterpret_cast<Tokens<T>*>(tile)[i] = read;
  }
}

// low[r][t] = sum over i of A[r, i] x[t, i]: a thread for each.
template <class Value, class X>
__device__ __forceinline__ void multiply_down(const Task& task, int64_t inputs, X x, float* low) {
  constexpr int T = X::tokens, width = static_cast<int>(panel_width);
  const int64_t products = (task.rank + width - 1) / width * width * T;
  for (int64_t p = threadIdx.x; p < products; p += threads) {
    const int lane = static_cast<int>(p % width), token = static_cast<int>(p / width % T);
    const int64_t panel = p / width / T;
    const Value* a = static_cast<const Value*>(task.down) + panel * inputs * width + lane;
    float sum = 0;
#pragma unroll 8
    for (int64_t i = 0; i < inputs; ++i) sum = fmaf(load_value(a + i * width), x.read(i, token), sum);
    low[(panel * width + lane) * T + token] = sum;
  }
}

// sum[h][t] += sum over k of matrix[o, k] x[k][t] for the thread's outputs o.
template <class Value, class X> __device__ __forceinline__ void multiply_up(const void* matrix, int64_t outputs,
                                                                            int64_t first, int64_t inputs, X x,
                                                                            float (&sum)[2][X::tokens]) {
  const Value* w[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    int64_t o = first + h * rows_apart + threadIdx.x;
    o = o < outputs ? o : outputs - 1;
    w[h] = static_cast<const Value*>(matrix) + o / panel_width * inputs * panel_width + o % panel_width;
  }
#pragma unroll 4
  for (int64_t k = 0; k < inputs; ++k) {
    const float value[2] = {load_value(w[0] + k * panel_width), load_value(w[1] + k * panel_width)};
    const Tokens<X::tokens> other = x.read(k);
#pragma unroll
    for (int t = 0; t < X::tokens; ++t) {
      sum[0][t] = fmaf(value[0], other.value[t], sum[0][t]);
      sum[1][t] = fmaf(value[1], other.value[t], sum[1][t]);
    }
  }
}

// Groups of 16 threads go through groups of 16 rows, a long one and a short one each.
template <class Value, class X>
__device__ __forceinline__ void sum_entries(const Task& task, int64_t first, X x, float* sums) {
  constexpr int T = X::tokens;
  const int lane = threadIdx.x % group_rows, own = threadIdx.x / group_rows;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    const int64_t group = first / group_rows + (pass ? block_groups - 1 - own : own);
    const int64_t begin = __ldg(task.begin + group), end = __ldg(task.begin + group + 1);
    const int row = __ldg(task.order + group * group_rows + lane);
    float sum[T];
    const float bias = task.bias ? __ldg(task.bias + first + row) : 0;
#pragma unroll
    for (int t = 0; t < T; ++t) sum[t] = bias;
#pragma unroll 4
    for (int64_t slot = begin; slot < end; ++slot) {
      const int64_t at = slot * group_rows + lane, input = __ldg(task.index + at);
      const float value = load_value(static_cast<const Value*>(task.value) + at);
      const Tokens<T> other = x.read(input);
#pragma unroll
      for (int t = 0; t < T; ++t) sum[t] = fmaf(value, other.value[t], sum[t]);
    }
#pragma unroll
    for (int t = 0; t < T; ++t) sums[t * block_rows + row] = sum[t];
  }
}

template <int T>
__device__ __forceinline__ void store_sums(const Arguments& a, int64_t token, int64_t first, const float (&sum)[2][T]) {
  const int64_t task = blockIdx.y;
#pragma unroll
  for (int t = 0; t < T; ++t) {
    if (token + t >= a.tokens) return;
    const float* base = a.base ? a.base + task * a.base_task + find_row(a, token + t) * a.base_row : nullptr;
    float* z = a.z + task * a.z_task + (token + t) * a.z_row;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t o = first + h * rows_apart + threadIdx.x;
      if (o < a.outputs) z[o] = base ? __ldg(base + o) + sum[h][t] : sum[h][t];
    }
  }
}

// The outputs of the block's chunk. Shared memory: x, A x, and the sums of sparse rows, in the order of outputs.
template <class Value, class X> __device__ __forceinline__ void add_task(const Arguments& a, const Task& task,
                                                                         int64_t token, X x, float* low, float* sums) {
  constexpr int T = X::tokens;
  if (task.kind == Kind::low_rank) {
    multiply_down<Value>(task, a.inputs, x, low);
    core::cuda::barrier();
  }
  for (int64_t first = blockIdx.x % a.chunks * block_rows; first < a.outputs; first += a.chunks * block_rows) {
    float sum[2][T];
    if (task.kind == Kind::sparse) {
      sum_entries<Value>(task, first, x, sums);
      core::cuda::barrier();
#pragma unroll
      for (int t = 0; t < T; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) sum[h][t] = sums[t * block_rows + h * rows_apart + threadIdx.x];
      core::cuda::barrier();
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float bias = task.bias ? __ldg(task.bias + first + h * rows_apart + threadIdx.x) : 0;
#pragma unroll
        for (int t = 0; t < T; ++t) sum[h][t] = bias;
      }
      if (task.kind == Kind::low_rank) multiply_up<Value>(task.value, a.outputs, first, task.rank, Tile<T>{low}, sum);
      else if (task.kind == Kind::dense) multiply_up<Value>(task.value, a.outputs, first, a.inputs, x, sum);
    }
    store_sums<T>(a, token, first, sum);
  }
}

// Grid: tiles of T tokens by chunks of outputs, tasks.
template <int T> __global__ void __launch_bounds__(threads, 4) add_deltas(const __grid_constant__ Arguments a) {
  float* shared = core::cuda::shared_memory<float>();
  const Task& task = a.task[blockIdx.y];
  const int64_t tile = blockIdx.x / a.chunks;
  if constexpr (T == 0) {
    const Tile<0> x{a.x + blockIdx.y * a.x_task + find_row(a, tile) * a.x_row, a.inputs};
    float* low = shared + block_rows;
    task.storage == Storage::f32 ? add_task<float>(a, task, tile, x, low, shared)
                                 : add_task<uint16_t>(a, task, tile, x, low, shared);
  } else {
    float *sums = shared, *staged = shared + T * block_rows, *low = staged + (a.inputs + 1) * T;
    stage_tokens<T>(a, tile * T, staged);
    core::cuda::barrier();
    const Tile<T> x{staged};
    task.storage == Storage::f32 ? add_task<float>(a, task, tile * T, x, low, sums)
                                 : add_task<uint16_t>(a, task, tile * T, x, low, sums);
  }
}

using core::divide_up;

int64_t read_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  core::cuda::check(cudaGetDevice(&device));
  core::cuda::check(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

template <int T> void start(Arguments& a, int64_t tasks, int64_t floats, cudaStream_t stream) {
  constexpr int64_t tokens = T == 0 ? 1 : T;
  const int64_t tiles = divide_up(a.tokens, tokens);
  const int64_t wanted = blocks_per_multiprocessor * read_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t blocks = divide_up(a.outputs, block_rows);
  a.chunks = static_cast<unsigned>(std::clamp<int64_t>(divide_up(wanted, tiles * tasks), 1, blocks));
  core::cuda::launch(add_deltas<T>, dim3(static_cast<unsigned>(tiles * a.chunks), static_cast<unsigned>(tasks)),
                     threads, static_cast<size_t>(floats) * sizeof(float), stream, a);
}

// As many tokens side by side as there are, and as leave room for two blocks on a multiprocessor.
void choose_tile(Arguments& a, int64_t tasks, int64_t ranks, cudaStream_t stream) {
  const int64_t limit = read_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) / static_cast<int64_t>(sizeof(float));
  const auto floats = [&](int64_t tokens) { return tokens * (block_rows + a.inputs + 1 + ranks); };
  if (a.tokens > 4 && floats(8) <= limit / 2) return start<8>(a, tasks, floats(8), stream);
  if (a.tokens > 2 && floats(4) <= limit / 2) return start<4>(a, tasks, floats(4), stream);
  if (a.tokens > 1 && floats(2) <= limit) return start<2>(a, tasks, floats(2), stream);
  if (floats(1) <= limit) return start<1>(a, tasks, floats(1), stream);
  if (block_rows + ranks > limit)
    throw std::invalid_argument("deltas: expected a rank of at most " + std::to_string(limit - block_rows) + ", got " +
                                std::to_string(ranks));
  start<0>(a, tasks, block_rows + ranks, stream);
}

}  // namespace

void delta_linear(const Call& call, void* stream) {
  if (call.tokens == 0) return;
  for (size_t n = 0; n < call.tasks.size(); n += most_tasks) {
    const size_t count = std::min(most_tasks, call.tasks.size() - n);
    const auto before = static_cast<int64_t>(n);
    Arguments a{};
    int64_t ranks = 0;
    for (size_t i = 0; i < count; ++i) {
      a.task[i] = call.tasks[n + i];
      ranks = std::max(ranks, divide_up(a.task[i].rank, panel_width) * panel_width);
    }
    a.tokens = call.tokens;
    a.outputs = call.outputs;
    a.inputs = call.inputs;
    a.x = call.x + before * call.x_task;
    a.x_task = call.x_task;
    a.x_row = call.x_row;
    a.positions = call.positions;
    a.base = call.base ? call.base + before * call.base_task : nullptr;
    a.base_task = call.base_task;
    a.base_row = call.base_row;
    a.z = call.z + before * call.z_task;
    a.z_task = call.z_task;
    a.z_row = call.z_row;
    choose_tile(a, static_cast<int64_t>(count), ranks, static_cast<cudaStream_t>(stream));
  }
}

}  // namespace pycodesign::sharing::cuda

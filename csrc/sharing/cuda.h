#pragma once

#include <cstdint>
#include <vector>

#include "sharing/sharing.h"

namespace pycodesign::sharing::cuda {

// A task's Delta in device memory, in the same form; null where there is nothing.
struct Task {
  Kind kind;
  Storage storage;
  int32_t rank;
  const int32_t*
      begin;  // sparse: where the entries of each group of 16 rows lie, in rows of 16, and where the last end
  const uint8_t* order;   // of rows within a block
  const uint16_t* index;  // 16 rows side by side
  const void* value;      // of a sparse matrix, of B (O, r), or of a dense one
  const void* down;       // A (r, I)
  const float* bias;      // outputs rounded up to blocks
};

// As sharing::Call, with device memory.
struct Call {
  std::vector<Task> tasks;
  int64_t tokens, outputs, inputs;
  const float* x;
  int64_t x_task, x_row;
  const int64_t* positions;  // (tokens): which rows of x and base; null: all in their places
  const float* base;
  int64_t base_task, base_row;
  float* z;
  int64_t z_task, z_row;
};

// The bits of sharing::delta_linear where that fuses a product with its sum. Queues kernels on `stream`, a cudaStream_t
// of the current device, one for every 32 tasks, and does not wait.
void delta_linear(const Call& call, void* stream);

}  // namespace pycodesign::sharing::cuda

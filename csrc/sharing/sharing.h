// Many tasks, one pass: what each task adds to the output of a linear layer that all of them share.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/aligned_buffer.h"

namespace pycodesign::sharing {

enum class Kind { none, sparse, low_rank, dense };
const char* kind_name(Kind kind);

// How values are kept; they are computed with in float32.
enum class Storage { f32, bf16 };

constexpr int64_t block_rows = 256;  // outputs whose entries lie together
constexpr int64_t group_rows = 16;   // of them, side by side: one entry of each
constexpr int64_t octet_rows = 8;    // of them, which end alike
constexpr int64_t panel_width = 16;  // outputs of a matrix that lie side by side
constexpr int64_t most_inputs = (1 << 16) - 1;

// The entries of a sparse (O, I) matrix. Within a block, rows are sorted by how many entries they have, so that loops
// over neighbors end alike: the rows of an octet have as many, for which zeros at the index I fill up. Entry j of the
// 16 rows of a group lies side by side, for lanes that are rows.
struct SparseRows {
  std::vector<int64_t> begin;   // (blocks): where its first entry lies, in rows of 16
  std::vector<uint32_t> count;  // (blocks * 32): of each octet, descending within a block
  std::vector<uint8_t> order;   // (blocks * 256): which row of the block this is
  core::AlignedBuffer<uint16_t> index;
  core::AlignedBuffer<char> value;
};

// A matrix (outputs, inputs): element (o, i) at [o / 16][i][o % 16].
struct Panels {
  int64_t inputs = 0;
  core::AlignedBuffer<char> value;
};

// One task's difference of weights and bias, in the form that kernels read. Immutable once made.
struct Delta {
  Kind kind = Kind::none;
  Storage storage = Storage::f32;
  int64_t outputs = 0, inputs = 0, entries = 0, rank = 0, bytes = 0;
  SparseRows sparse;
  Panels down, up;          // low_rank: A (r, I) and B (O, r); dense: up alone (O, I)
  std::vector<float> bias;  // empty, or outputs rounded up to blocks
};
using DeltaPointer = std::shared_ptr<const Delta>;

// bias: `outputs` floats or null. All throw std::invalid_argument for what they cannot hold.
DeltaPointer pack_none(int64_t outputs, int64_t inputs, const float* bias);

// Entries sorted by row, then column, none twice.
struct Entries {
  int64_t count;
  const int32_t *row, *column;
  const float* value;
};
DeltaPointer pack_sparse(int64_t outputs, int64_t inputs, const Entries& entries, const float* bias, Storage storage);

// b (O, r) and a (r, I), in C order.
DeltaPointer pack_low_rank(int64_t outputs, int64_t inputs, int64_t rank, const float* b, const float* a,
                           const float* bias, Storage storage);

// w (O, I), in C order.
DeltaPointer pack_dense(int64_t outputs, int64_t inputs, const float* w, const float* bias, Storage storage);

// z[n, t, o] = base[n, t, o] + (bias_n[o] + sum over i, ascending, of delta_n[o, i] * x[n, t, i])
//
// The sum starts at the bias (or 0) and takes one multiply-add after the other, whatever the tile, so that a result
// depends on nothing but its own row of x, of delta and of base. Low rank: the same twice, first with A, then with B.
struct Call {
  std::vector<DeltaPointer> tasks;  // of one size
  int64_t tokens;                   // rows for each task
  const float* x;                   // strides in elements; within a row elements follow one another
  int64_t x_task, x_row;            // x_task 0: all tasks read the same rows
  const float* base;                // null: zeros
  int64_t base_task, base_row;
  float* z;  // apart from everything else
  int64_t z_task, z_row;
};
void delta_linear(const Call& call);

}  // namespace pycodesign::sharing

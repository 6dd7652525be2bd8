// The inner loops of delta_linear, one table of them for each instruction set.
#pragma once

#include <cstdint>

#include "sharing/sharing.h"

namespace pycodesign::sharing {

constexpr int most_panels = 4;  // that a kernel takes at once

// Groups of rows of a block of a task's sparse matrix; see SparseRows.
struct SparseGroups {
  int64_t rows;           // a multiple of 16
  const uint32_t* count;  // (rows / 8)
  const uint8_t* order;   // (rows)
  const uint16_t* index;
  const void* value;
  Storage storage;
  const float* bias;  // (256) of the block, or null
};

// Tokens side by side: x transposed, `width` tokens for each input, and zeros for the index behind the last.
struct Tile {
  float* data;    // (inputs + 1, width), on a cache line
  int64_t width;  // 16, 32 or the kernels' widest
};

// Sums of a block's rows to rows of the output: z[t][r] = base[t][r] + sums[t / lanes][r][t % lanes], with 256 rows
// from one vector of tokens to the next. Of a part, sums begin at its first row and token; it lies in one vector of
// tokens or begins with one.
struct FinishedTile {
  const float* sums;
  int64_t rows, tokens;
  const float* base;  // or null
  int64_t base_row;
  float* z;
  int64_t z_row;
};

// Rows of x times up to four panels; out[p][t][o] = base[p][t][o] + (bias[p][o] + sum of panel[p][i][o] * x[t][i]).
struct PanelProduct {
  const float* x;
  int64_t x_row, rows, inputs;
  Storage storage;
  int panels;
  const void* panel[most_panels];
  const float* bias[most_panels];  // (16), or null
  const float* base[most_panels];  // or null
  float* out[most_panels];
  int64_t base_row[most_panels], out_row[most_panels];
  int64_t width[most_panels];  // outputs that are wanted, at most 16
};

struct Kernels {
  int64_t lanes, widest_tile;
  // tile[c][t] = x[t][c] for `inputs` columns, not more; zeros for tokens beyond.
  void (*stage_tile)(const float* x, int64_t x_row, int64_t tokens, int64_t inputs, const Tile& tile);
  // sums[t / lanes][r][t % lanes] = bias[r] + sum of the entries of row r times tile[column][t]; (width / lanes, 256,
  // lanes) of the block.
  void (*sum_tile)(const SparseGroups& groups, const Tile& tile, float* sums);
  void (*finish_tile)(const FinishedTile& tile);
  // sums[r] = bias[r] + sum of the entries of row r times x[column]; behind x lies a zero.
  void (*sum_token)(const SparseGroups& groups, const float* x, float* sums);
  // z[r] = base[r] + sums[r]
  void (*finish_token)(const float* sums, int64_t rows, const float* base, float* z);
  void (*multiply_panels)(const PanelProduct& product);
};

// Each overwrites what it improves; scalar fills everything.
void fill_scalar(Kernels&);
void fill_avx2(Kernels&);
void fill_avx512(Kernels&);

const Kernels& kernels();  // of the active instruction set

}  // namespace pycodesign::sharing

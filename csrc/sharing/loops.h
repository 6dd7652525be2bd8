// The kernels, written once over a vector of floats. Every instruction set's file includes this after defining, with
// internal linkage:
//
//   lanes, f32v                  a vector; lanes divide 16
//   tile_vectors                 sums of a row that are kept in registers
//   panel_rows, panel_vectors    sums of a product of panels that are
//   load, store, splat           unaligned
//   load_bf16(p)                 `lanes` values of 16 bits as a vector
//   fma(a, b, c)                 a * b + c
//   gather(x, index)             x[index[l]] in lane l
//   select_first(n, a, b)        a in the first n lanes, b in the others
//   transpose(v)                 of lanes x lanes
#pragma once

#include <algorithm>
#include <cstring>

#include "sharing/kernels.h"

namespace pycodesign::sharing {
namespace {

inline float to_float(float value) { return value; }
inline float to_float(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline f32v load_values(const float* p) { return load(p); }
inline f32v load_values(const uint16_t* p) { return load_bf16(p); }

// std::min is a function that other instruction sets share.
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void stage_tile(const float* x, int64_t x_row, int64_t tokens, int64_t inputs, const Tile& tile) {
  for (int64_t t = 0; t < tile.width; t += lanes) {
    const int64_t used = least(lanes, tokens - t);  // may be negative
    const float* from = x + t * x_row;
    float* to = tile.data + t;
    int64_t c = 0;
    for (; c + lanes <= inputs; c += lanes) {
      f32v v[lanes];
      for (int l = 0; l < lanes; ++l) v[l] = l < used ? load(from + l * x_row + c) : splat(0);
      transpose(v);
      for (int l = 0; l < lanes; ++l) store(to + (c + l) * tile.width, v[l]);
    }
    for (; c < inputs; ++c)
      for (int l = 0; l < lanes; ++l) to[c * tile.width + l] = l < used ? from[l * x_row + c] : 0;
  }
}

template <class Value, int width> void sum_tile_of(const SparseBlock& block, const float* tile, float* sums) {
  constexpr int V = width / lanes < tile_vectors ? width / lanes : tile_vectors;
  const uint16_t* index = block.index;
  const auto* value = static_cast<const Value*>(block.value);
  for (int64_t g = 0; g < block_rows; g += group_rows) {
    for (int64_t l = g; l < g + group_rows; ++l) {
      const int64_t row = block.order[l], count = block.count[l], lane = l - g;
      for (int64_t part = 0; part < width; part += V * lanes) {
        f32v sum[V];
        for (int v = 0; v < V; ++v) sum[v] = splat(block.bias ? block.bias[row] : 0);
        for (int64_t j = 0; j < count; ++j) {
          const float* x = tile + part + int64_t{index[j * group_rows + lane]} * width;
          const f32v w = splat(to_float(value[j * group_rows + lane]));
          for (int v = 0; v < V; ++v) sum[v] = fma(w, load(x + v * lanes), sum[v]);
        }
        for (int v = 0; v < V; ++v) store(sums + row * width + part + v * lanes, sum[v]);
      }
    }
    index += block.count[g] * group_rows;
    value += block.count[g] * group_rows;
  }
}

template <class Value> void sum_tile_as(const SparseBlock& block, const Tile& tile, float* sums) {
  switch (tile.width) {
    case 16: return sum_tile_of<Value, 16>(block, tile.data, sums);
    case 32: return sum_tile_of<Value, 32>(block, tile.data, sums);
    default: return sum_tile_of<Value, 64>(block, tile.data, sums);
  }
}

void sum_tile(const SparseBlock& block, const Tile& tile, float* sums) {
  block.storage == Storage::f32 ? sum_tile_as<float>(block, tile, sums) : sum_tile_as<uint16_t>(block, tile, sums);
}

// to[i] = base[i] + sum[i] for the first n of a vector's lanes.
inline void store_sum(f32v sum, const float* base, float* to, int64_t n) {
  if (n >= lanes) {
    store(to, base ? load(base) + sum : sum);
  } else {
    float lane[lanes];
    store(lane, sum);
    for (int64_t i = 0; i < n; ++i) to[i] = base ? base[i] + lane[i] : lane[i];
  }
}

void finish_block(const FinishedBlock& b) {
  for (int64_t t = 0; t < b.tokens; t += lanes)
    for (int64_t r = 0; r < b.rows; r += lanes) {
      f32v v[lanes];
      for (int l = 0; l < lanes; ++l) v[l] = load(b.sums + (r + l) * b.width + t);
      transpose(v);
      for (int64_t l = 0; l < lanes; ++l) {
        if (t + l >= b.tokens) break;
        store_sum(v[l], b.base ? b.base + (t + l) * b.base_row + r : nullptr, b.z + (t + l) * b.z_row + r, b.rows - r);
      }
    }
}

template <class Value>
void sum_token_as(const SparseBlock& block, const float* x, int64_t rows, const float* base, float* z) {
  alignas(64) float sums[block_rows];
  constexpr int V = group_rows / lanes;
  const uint16_t* index = block.index;
  const auto* value = static_cast<const Value*>(block.value);
  for (int64_t g = 0; g < block_rows; g += group_rows) {
    const uint32_t* count = block.count + g;
    float start[group_rows];
    for (int l = 0; l < group_rows; ++l) start[l] = block.bias ? block.bias[block.order[g + l]] : 0;
    f32v sum[V];
    for (int v = 0; v < V; ++v) sum[v] = load(start + v * lanes);
    const int64_t longest = count[0], shortest = count[group_rows - 1];
    int64_t j = 0;
    for (; j < shortest; ++j, index += group_rows, value += group_rows)
      for (int v = 0; v < V; ++v) sum[v] = fma(load_values(value + v * lanes), gather(x, index + v * lanes), sum[v]);
    for (int64_t active = group_rows; j < longest; ++j, index += group_rows, value += group_rows) {
      while (count[active - 1] <= j) --active;
      for (int v = 0; v < V; ++v) {
        const f32v next = fma(load_values(value + v * lanes), gather(x, index + v * lanes), sum[v]);
        sum[v] = select_first(active - v * lanes, next, sum[v]);
      }
    }
    for (int v = 0; v < V; ++v) store(start + v * lanes, sum[v]);
    for (int l = 0; l < group_rows; ++l) sums[block.order[g + l]] = start[l];
  }
  for (int64_t r = 0; r < rows; r += lanes) store_sum(load(sums + r), base ? base + r : nullptr, z + r, rows - r);
}

void sum_token(const SparseBlock& block, const float* x, int64_t rows, const float* base, float* z) {
  block.storage == Storage::f32 ? sum_token_as<float>(block, x, rows, base, z)
                                : sum_token_as<uint16_t>(block, x, rows, base, z);
}

// R rows by P panels.
template <class Value, int R, int P> void multiply_panels_of(const PanelProduct& p, int64_t row, int first) {
  constexpr int V = panel_width / lanes;  // vectors of a panel
  const float* x = p.x + row * p.x_row;
  f32v sum[R][P][V];
  for (int q = 0; q < P; ++q)
    for (int v = 0; v < V; ++v) {
      const float* bias = p.bias[first + q];
      for (int r = 0; r < R; ++r) sum[r][q][v] = bias ? load(bias + v * lanes) : splat(0);
    }
  for (int64_t i = 0; i < p.inputs; ++i) {
    f32v w[P][V];
    for (int q = 0; q < P; ++q)
      for (int v = 0; v < V; ++v)
        w[q][v] = load_values(static_cast<const Value*>(p.panel[first + q]) + i * panel_width + v * lanes);
    for (int r = 0; r < R; ++r) {
      const f32v value = splat(x[r * p.x_row + i]);
      for (int q = 0; q < P; ++q)
        for (int v = 0; v < V; ++v) sum[r][q][v] = fma(w[q][v], value, sum[r][q][v]);
    }
  }
  for (int q = 0; q < P; ++q) {
    const float* base = p.base[first + q];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v)
        store_sum(sum[r][q][v], base ? base + (row + r) * p.base_row[first + q] + v * lanes : nullptr,
                  p.out[first + q] + (row + r) * p.out_row[first + q] + v * lanes, p.width[first + q] - v * lanes);
  }
}

template <class Value, int P> void multiply_rows(const PanelProduct& p, int first) {
  int64_t row = 0;
  for (; row + panel_rows <= p.rows; row += panel_rows) multiply_panels_of<Value, panel_rows, P>(p, row, first);
  for (; row < p.rows; ++row) multiply_panels_of<Value, 1, P>(p, row, first);
}

template <class Value> void multiply_panels_as(const PanelProduct& p) {
  constexpr int P = panel_vectors * lanes / panel_width;
  int q = 0;
  for (; q + P <= p.panels; q += P) multiply_rows<Value, P>(p, q);
  for (; q < p.panels; ++q) multiply_rows<Value, 1>(p, q);
}

void multiply_panels(const PanelProduct& p) {
  p.storage == Storage::f32 ? multiply_panels_as<float>(p) : multiply_panels_as<uint16_t>(p);
}

void fill(Kernels& k) { k = {stage_tile, sum_tile, finish_block, sum_token, multiply_panels}; }

}  // namespace
}  // namespace pycodesign::sharing

// The kernels, written once over a vector of floats. Every instruction set's file includes this after defining, with
// internal linkage:
//
//   lanes, f32v                  a vector; lanes divide 16
//   widest_tile                  tokens of a tile, at most: 32 or 64
//   tile_vectors, joint_sums     sums of a row, and of rows of an octet, that are kept in registers, at most
//   panel_rows, panel_vectors    sums of a product of panels that are
//   load, store, splat           unaligned
//   load_bf16(p)                 `lanes` values of 16 bits as a vector
//   fma(a, b, c)                 a * b + c, of vectors and of floats alike
//   load_transposed(p, step, v)  lane r of v[t] is p[r * step + t], for t < 4
#pragma once

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
      if (used == lanes) {
        for (int l = 0; l < lanes; l += 4) load_transposed(from + c + l, x_row, *reinterpret_cast<f32v(*)[4]>(v + l));
      } else {
        float rows[lanes * lanes] = {};
        for (int64_t l = 0; l < used; ++l) store(rows + l * lanes, load(from + l * x_row + c));
        for (int l = 0; l < lanes; l += 4) load_transposed(rows + l, lanes, *reinterpret_cast<f32v(*)[4]>(v + l));
      }
      for (int l = 0; l < lanes; ++l) store(to + (c + l) * tile.width, v[l]);
    }
    for (; c < inputs; ++c)
      for (int l = 0; l < lanes; ++l) to[c * tile.width + l] = l < used ? from[l * x_row + c] : 0;
  }
}

// R rows by V vectors of tokens, `width` apart from one input to the next.
template <class Value, int R, int V, int width>
inline void sum_rows(const uint16_t* index, const Value* value, int64_t count, const float* tile, f32v (&sum)[R][V]) {
  for (; count > 0; --count, index += group_rows, value += group_rows)
    for (int r = 0; r < R; ++r) {
      const float* x = tile + int64_t{index[r]} * width;
      __asm__("" : "+r"(x));  // one addition, not one in each load
      const f32v w = splat(to_float(value[r]));
      for (int v = 0; v < V; ++v) sum[r][v] = fma(w, load(x + v * lanes), sum[r][v]);
    }
}

template <class Value, int width> void sum_tile_of(const SparseGroups& groups, const float* tile, float* sums) {
  constexpr int V = width / lanes < tile_vectors ? width / lanes : tile_vectors;
  constexpr int R = joint_sums / V < octet_rows ? joint_sums / V : octet_rows;
  const uint16_t* index = groups.index;
  const auto* value = static_cast<const Value*>(groups.value);
  for (int64_t l = 0; l < groups.rows; l += R) {
    const int64_t lane = l % group_rows, count = groups.count[l / octet_rows];
    const uint8_t* order = groups.order + l;
    float* to[R];
    f32v start[R];
    for (int r = 0; r < R; ++r) {
      to[r] = sums + order[r] * lanes;
      start[r] = splat(groups.bias ? groups.bias[order[r]] : 0);
    }
    for (int64_t token = 0; token < width; token += V * lanes) {
      f32v sum[R][V];
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sum[r][v] = start[r];
      sum_rows<Value, R, V, width>(index + lane, value + lane, count, tile + token, sum);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(to[r] + (token + v * lanes) * block_rows, sum[r][v]);
    }
    if (lane + R == group_rows) {
      const int64_t longest = groups.count[l / group_rows * group_rows / octet_rows];
      index += longest * group_rows;
      value += longest * group_rows;
    }
  }
}

template <class Value> void sum_tile_as(const SparseGroups& groups, const Tile& tile, float* sums) {
  if (tile.width == 16) sum_tile_of<Value, 16>(groups, tile.data, sums);
  else if (tile.width == 32) sum_tile_of<Value, 32>(groups, tile.data, sums);
  else sum_tile_of<Value, widest_tile>(groups, tile.data, sums);
}

void sum_tile(const SparseGroups& groups, const Tile& tile, float* sums) {
  groups.storage == Storage::f32 ? sum_tile_as<float>(groups, tile, sums) : sum_tile_as<uint16_t>(groups, tile, sums);
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

// Four tokens of 16 rows: whole lines where z is aligned, one after the other. All loads come before all stores: rows
// often are a multiple of 4 KB apart, and then a load would wait for the store before it.
inline void finish_four(const float* sums, const float* base, int64_t base_row, float* z, int64_t z_row) {
  constexpr int V = group_rows / lanes;
  f32v sum[V][4];
  for (int v = 0; v < V; ++v) load_transposed(sums + v * lanes * lanes, lanes, sum[v]);
  if (base)
    for (int l = 0; l < 4; ++l)
      for (int v = 0; v < V; ++v) sum[v][l] = load(base + l * base_row + v * lanes) + sum[v][l];
  for (int l = 0; l < 4; ++l)
    for (int v = 0; v < V; ++v) store(z + l * z_row + v * lanes, sum[v][l]);
}

void finish_tile(const FinishedTile& f) {
  const int64_t rows = f.rows, tokens = f.tokens, base_row = f.base_row, z_row = f.z_row;
  for (int64_t t = 0; t < tokens; t += 4)
    for (int64_t r = 0; r < rows; r += group_rows) {
      const float* sums = f.sums + t / lanes * lanes * block_rows + r * lanes + t % lanes;
      const float* base = f.base ? f.base + t * base_row + r : nullptr;
      float* z = f.z + t * z_row + r;
      if (t + 4 <= tokens && r + group_rows <= rows) {
        finish_four(sums, base, base_row, z, z_row);
      } else {
        float four[4 * group_rows];
        finish_four(sums, nullptr, 0, four, group_rows);
        for (int64_t l = 0; l < least(4, tokens - t); ++l)
          for (int64_t v = 0; v < least(group_rows, rows - r); v += lanes)
            store_sum(load(four + l * group_rows + v), base ? base + l * base_row + v : nullptr, z + l * z_row + v,
                      rows - r - v);
      }
    }
}

// Eight sums at once, each in a register. Behind a SIMD gather is a load for each lane, too.
template <class Value> void sum_token_as(const SparseGroups& groups, const float* x, float* sums) {
  const uint16_t* index = groups.index;
  const auto* value = static_cast<const Value*>(groups.value);
  for (int64_t l = 0; l < groups.rows; l += octet_rows) {
    const uint8_t* order = groups.order + l;
    const uint32_t* count = groups.count + l / octet_rows;
    const int64_t lane = l % group_rows;
    float sum[octet_rows];
    for (int r = 0; r < octet_rows; ++r) sum[r] = groups.bias ? groups.bias[order[r]] : 0;
    const uint16_t* i = index + lane;
    const Value* v = value + lane;
    for (uint32_t j = 0; j < *count; ++j, i += group_rows, v += group_rows)
#pragma GCC unroll 8
      for (int r = 0; r < octet_rows; ++r) sum[r] = fma(to_float(v[r]), x[i[r]], sum[r]);
    for (int r = 0; r < octet_rows; ++r) sums[order[r]] = sum[r];
    if (lane + octet_rows == group_rows) {
      const int64_t longest = groups.count[(l - lane) / octet_rows];
      index += longest * group_rows;
      value += longest * group_rows;
    }
  }
}

void sum_token(const SparseGroups& groups, const float* x, float* sums) {
  groups.storage == Storage::f32 ? sum_token_as<float>(groups, x, sums) : sum_token_as<uint16_t>(groups, x, sums);
}

void finish_token(const float* sums, int64_t rows, const float* base, float* z) {
  for (int64_t r = 0; r < rows; r += lanes) store_sum(load(sums + r), base ? base + r : nullptr, z + r, rows - r);
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

void fill(Kernels& k) {
  k = {lanes, widest_tile, stage_tile, sum_tile, finish_tile, sum_token, finish_token, multiply_panels};
}

}  // namespace
}  // namespace pycodesign::sharing

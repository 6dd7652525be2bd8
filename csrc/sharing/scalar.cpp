// Four lanes that every compiler knows how to lower: SSE2 on plain x86-64, NEON on aarch64.
#include <cstdint>
#include <cstring>

#include "sharing/kernels.h"

namespace pycodesign::sharing {
namespace {

constexpr int lanes = 4;
constexpr int widest_tile = 32, tile_vectors = 2, joint_sums = 8;
constexpr int panel_rows = 2, panel_vectors = 4;

typedef float f32v __attribute__((vector_size(16), may_alias));
typedef uint32_t u32v __attribute__((vector_size(16), may_alias));

inline f32v load(const float* p) {
  f32v v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, f32v v) { std::memcpy(p, &v, sizeof v); }
inline f32v splat(float value) { return f32v{value, value, value, value}; }
inline f32v load_bf16(const uint16_t* p) {
  const u32v bits = {p[0], p[1], p[2], p[3]};
  return reinterpret_cast<f32v>(bits << 16);
}
inline f32v fma(f32v a, f32v b, f32v c) { return a * b + c; }
inline float fma(float a, float b, float c) { return a * b + c; }
inline void load_transposed(const float* p, int64_t step, f32v (&v)[4]) {
  const f32v a = load(p), b = load(p + step), c = load(p + 2 * step), d = load(p + 3 * step);
  for (int l = 0; l < lanes; ++l) v[l] = f32v{a[l], b[l], c[l], d[l]};
}

}  // namespace
}  // namespace pycodesign::sharing

#include "sharing/loops.h"

namespace pycodesign::sharing {
void fill_scalar(Kernels& k) { fill(k); }
}  // namespace pycodesign::sharing

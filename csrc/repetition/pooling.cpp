#include "repetition/pooling.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "core/aligned_buffer.h"
#include "core/thread_pool.h"

namespace pycodesign::repetition {

namespace {

// A window of a plane.
struct Window {
  const char* plane;
  int64_t width, top, bottom, left, right;
  int64_t pixels() const { return (bottom - top) * (right - left); }
};

template <class T, class Sum> Sum sum_window(const Window& v) {
  Sum sum = 0;
  for (int64_t h = v.top; h < v.bottom; ++h)
    for (int64_t w = v.left; w < v.right; ++w)
      sum += static_cast<Sum>(reinterpret_cast<const T*>(v.plane)[h * v.width + w]);
  return sum;
}

// Rows that lie side by side are one.
template <class T> int32_t sum_bytes(const Window& v) {
  if (v.left > 0 || v.right < v.width) return sum_window<T, int32_t>(v);
  return sum_window<T, int32_t>({v.plane, 0, 0, 1, v.top * v.width, v.bottom * v.width});
}

// Sums of 16, added in double: a window may be a whole map. Inlined, it would slow small windows down.
[[gnu::noinline]] float sum_large_window(const Window& v) {
  double sum = 0;
  for (int64_t h = v.top; h < v.bottom; ++h)
    for (int64_t w = v.left; w < v.right; w += 16)
      sum += sum_window<float, float>({v.plane, v.width, h, h + 1, w, std::min(w + 16, v.right)});
  return static_cast<float>(sum);
}

// What of a window lies in the map, along one axis.
struct Range {
  int64_t begin, end;
};
Range within(const Pool& p, size_t axis, int64_t index, int64_t size) {
  const int64_t window = p.kernel[0] ? p.kernel[axis] : size, first = index * p.stride[axis] - p.padding[axis];
  return {std::max<int64_t>(first, 0), std::min(first + window, size)};
}

// Sums of a window of pixels, for some channels: in the order of one channel's.
template <class T>
void sum_pixels(const Tensor& x, const char* from, Range rows, Range columns, int64_t count, char* sums) {
  using Sum = std::conditional_t<std::is_same_v<T, float>, float, int32_t>;
  constexpr int64_t most = 64;
  Sum part[most]{};
  const auto add = [&](int64_t h, int64_t first, int64_t last) {
    for (int64_t w = first; w < last; ++w) {
      const T* pixel = reinterpret_cast<const T*>(from + h * x.stride[2] + w * x.stride[3]);
      for (int64_t c = 0; c < count; ++c) part[c] += static_cast<Sum>(pixel[c]);
    }
  };
  if (!std::is_same_v<T, float> || (rows.end - rows.begin) * (columns.end - columns.begin) <= 16) {
    for (int64_t h = rows.begin; h < rows.end; ++h) add(h, columns.begin, columns.end);
    std::memcpy(sums, part, static_cast<size_t>(count) * 4);
    return;
  }
  double total[most]{};
  for (int64_t h = rows.begin; h < rows.end; ++h)
    for (int64_t w = columns.begin; w < columns.end; w += 16) {
      std::fill_n(part, most, Sum{});
      add(h, w, std::min(w + 16, columns.end));
      for (int64_t c = 0; c < count; ++c) total[c] += static_cast<double>(part[c]);
    }
  for (int64_t c = 0; c < count; ++c) reinterpret_cast<float*>(sums)[c] = static_cast<float>(total[c]);
}

// Sums of windows, and for each what makes a mean of it.
struct WindowSums {
  const AvgPool& pool;
  int64_t image_pixels;
  char* sums;  // words, and room for a vector more
  float* multiplier;
  int32_t* correction;

  void set_pixels(int64_t first, int64_t count, int64_t pixels) const {
    const Pool& p = pool.window;
    const int64_t all = p.kernel[0] ? p.kernel[0] * p.kernel[1] : image_pixels;
    const auto scale = static_cast<float>(pool.scale / static_cast<double>(p.counts_padding ? all : pixels));
    std::fill_n(multiplier + first, count, scale);
    std::fill_n(correction + first, count, static_cast<int32_t>(-pool.zero_point * pixels));
  }
  void finish(const Kernels& k, const Epilogue& epilogue, int64_t count, char* out, int64_t out_stride) const {
    Finish f{};
    f.epilogue = &epilogue;
    f.acc = sums;
    f.count = count;
    f.per_element = true;
    f.multiplier = multiplier;
    f.correction = correction;
    f.out = out;
    f.out_stride = out_stride;
    k.finish(f);
  }
};

void avg_pool_pixels(const Kernels& k, const AvgPool& pool, DType from, const Tensor& x, const Tensor& out,
                     const Epilogue& epilogue) {
  constexpr int64_t together = 64;  // channels
  const int64_t pieces = (x.size[1] + together - 1) / together, OH = out.size[2], OW = out.size[3];
  core::parallel_for(out.size[0] * OH * pieces, [&](int64_t item, int) {
    const int64_t n = item / pieces / OH, oh = item / pieces % OH, first = item % pieces * together,
                  count = std::min(together, x.size[1] - first);
    alignas(64) char sums[together * 4 + 64];
    float multiplier[together];
    int32_t correction[together];
    const WindowSums windows{pool, x.size[2] * x.size[3], sums, multiplier, correction};
    const char* const channels = x.data + n * x.stride[0] + first * element_bytes(from);
    const Range rows = within(pool.window, 0, oh, x.size[2]);
    for (int64_t ow = 0; ow < OW; ++ow) {
      const Range columns = within(pool.window, 1, ow, x.size[3]);
      (from == DType::f32  ? sum_pixels<float>
       : from == DType::u8 ? sum_pixels<uint8_t>
                           : sum_pixels<int8_t>)(x, channels, rows, columns, count, sums);
      windows.set_pixels(0, count, (rows.end - rows.begin) * (columns.end - columns.begin));
      char* const to = out.data + n * out.stride[0] + first * out.stride[1] + oh * out.stride[2] + ow * out.stride[3];
      windows.finish(k, epilogue, count, to, out.stride[1]);
    }
  });
}

// Windows of one row, or, where a map has only one, of many maps.
void avg_pool_maps(const Kernels& k, const AvgPool& pool, DType from, const Tensor& x, const Tensor& out,
                   const Epilogue& epilogue) {
  constexpr int64_t many = 128;
  const int64_t C = x.size[1], H = x.size[2], W = x.size[3], OH = out.size[2], OW = out.size[3];
  const int64_t map_bytes = H * W * element_bytes(from), out_bytes = element_bytes(epilogue.out_dtype);
  const int64_t maps = OH * OW == 1 ? std::min(C, many) : 1, pieces = (C + maps - 1) / maps;
  core::parallel_for(x.size[0] * pieces, [&](int64_t item, int) {
    const int64_t n = item / pieces, first = item % pieces * maps, count = maps > 1 ? std::min(maps, C - first) : OW;
    const char* const map = x.data + (n * C + first) * map_bytes;
    char* to = out.data + n * out.stride[0] + first * OH * OW * out_bytes;
    thread_local core::AlignedBuffer<char> buffer;
    char* const sums = buffer.reserve(static_cast<size_t>(count) * 12 + 64);
    const WindowSums windows{pool, H * W, sums, reinterpret_cast<float*>(sums + count * 4),
                             reinterpret_cast<int32_t*>(sums + count * 8)};
    for (int64_t oh = 0; oh < OH; ++oh, to += OW * out_bytes) {
      const Range rows = within(pool.window, 0, oh, H);
      for (int64_t i = 0; i < count; ++i) {
        const Range columns = within(pool.window, 1, maps > 1 ? 0 : i, W);
        const Window window{map + (maps > 1 ? i * map_bytes : 0), W, rows.begin, rows.end, columns.begin, columns.end};
        if (from == DType::f32)
          reinterpret_cast<float*>(sums)[i] =
              window.pixels() > 16 ? sum_large_window(window) : sum_window<float, float>(window);
        else
          reinterpret_cast<int32_t*>(sums)[i] =
              from == DType::u8 ? sum_bytes<uint8_t>(window) : sum_bytes<int8_t>(window);
        windows.set_pixels(i, 1, window.pixels());
      }
      windows.finish(k, epilogue, count, to, out_bytes);
    }
  });
}

MaxPool::Axis axis_of(const Pool& p, size_t i, const Tensor& x, const Tensor& out) {
  const int64_t size = x.size[i + 2];
  return {size, p.kernel[0] ? p.kernel[i] : size, p.stride[i], p.dilation[i], p.padding[i], out.size[i + 2]};
}

void max_pool_pixels(const Kernels& k, const Pool& p, DType dtype, const Tensor& x, const Tensor& out) {
  core::parallel_for(out.size[0] * out.size[2], [&](int64_t item, int) {
    const int64_t n = item / out.size[2], row = item % out.size[2];
    k.max_pool_pixels({dtype, x.data + n * x.stride[0], x.stride[2], x.stride[3], axis_of(p, 0, x, out),
                       axis_of(p, 1, x, out), row, x.stride[3], out.data + n * out.stride[0] + row * out.stride[2],
                       out.stride[3]});
  });
}

void max_pool_maps(const Kernels& k, const Pool& p, DType dtype, const Tensor& x, const Tensor& out) {
  const int64_t bytes = element_bytes(dtype), out_bytes = out.size[2] * out.size[3] * bytes;
  core::parallel_for(x.size[0] * x.size[1], [&](int64_t map, int) {
    thread_local core::AlignedBuffer<char> buffer;
    const char* const from = x.data + map * x.size[2] * x.size[3] * bytes;
    char* const to = out.data + map / x.size[1] * out.stride[0] + map % x.size[1] * out_bytes;
    MaxPool pool{dtype, from, axis_of(p, 0, x, out), axis_of(p, 1, x, out), nullptr, to};
    pool.scratch = buffer.reserve(static_cast<size_t>(pool.scratch_elements() * bytes));
    k.max_pool(pool);
  });
}

// A row of a pixel's channels is whole cache lines, more than any element.
bool is_channels_last(const Tensor& t, DType dtype) { return t.stride[3] > element_bytes(dtype); }

}  // namespace

int64_t Pool::output_size(size_t axis, int64_t size) const {
  if (kernel[axis] == 0) return 1;
  const int64_t span = size + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1;
  return span < 0 ? 0 : span / stride[axis] + 1;
}

void max_pool2d(const Kernels& k, const Pool& p, DType dtype, const Tensor& x, const Tensor& out) {
  (is_channels_last(x, dtype) ? max_pool_pixels : max_pool_maps)(k, p, dtype, x, out);
}

void avg_pool2d(const Kernels& k, const AvgPool& p, DType dtype, const Tensor& x, const Tensor& out,
                const Epilogue& epilogue) {
  (is_channels_last(x, dtype) ? avg_pool_pixels : avg_pool_maps)(k, p, dtype, x, out, epilogue);
}

}  // namespace pycodesign::repetition

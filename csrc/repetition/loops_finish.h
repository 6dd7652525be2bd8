// The epilogue, and pooling. A part of loops.h.
#pragma once

namespace pycodesign::repetition {
namespace {

inline float clamp(float v, float lo, float hi) {  // keeps NaN
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}

template <class T>
void add_residual(float* y, const char* p, int64_t stride, int64_t count, float zero_point, float scale) {
  if (stride == sizeof(T)) {
    const T* r = reinterpret_cast<const T*>(p);
    for (int64_t i = 0; i < count; ++i) y[i] = y[i] + scale * (static_cast<float>(r[i]) - zero_point);
  } else {
    for (int64_t i = 0; i < count; ++i)
      y[i] = y[i] + scale * (static_cast<float>(*reinterpret_cast<const T*>(p + i * stride)) - zero_point);
  }
}

// saturate(rint(y / scale) + zero_point); NaN gives the lowest. A product with the reciprocal is within 1e-4 of the
// quotient, so both round alike unless it is that close to a half: then the vector is divided after all.
struct Quantization {
  f32v scale, reciprocal, lowest, highest;
  i32v zero_point;
  bool divides;

  Quantization(DType dtype, float scale_, int32_t zero_point_)
      : scale(Float::splat(scale_)),
        reciprocal(Float::splat(1.0f / scale_)),
        lowest(Float::splat(static_cast<float>((dtype == DType::i8 ? -128 : 0) - zero_point_))),
        highest(lowest + 255.0f),
        zero_point(Int::splat(zero_point_)),
        divides(!(scale_ > 1e-30f && scale_ < 1e30f)) {}  // a reciprocal would not be normal

  f32v saturate(f32v v) const {
    v = v > lowest ? v : lowest;
    return v < highest ? v : highest;
  }
  bytesv operator()(f32v y) const {
    const f32v v = saturate(y * reciprocal);
    i32v q = round_words(v);
    if (__builtin_expect(divides || any_beyond(v - __builtin_convertvector(q, f32v), 0.4998f), 0))
      q = round_words(saturate(y / scale));
    return __builtin_convertvector(q + zero_point, bytesv);
  }
};

void quantize(const float* y, char* out, int64_t stride, int64_t count, const Quantization& q) {
  for (int64_t i = 0; i < count; i += lanes) {  // y is a buffer of whole vectors
    const bytesv bytes = q(Float::load(y + i));
    for (int64_t k = 0; k < lanes && i + k < count; ++k) out[(i + k) * stride] = static_cast<char>(bytes[k]);
  }
}

// y = acc * multiplier + bias, clamped.
template <bool per_element, class Acc, bool has_bias>
void scale_acc(const Finish& f, int64_t first, int64_t count, float lo, float hi, float* y) {
  const Acc* acc = reinterpret_cast<const Acc*>(f.acc) + first;
  const int64_t at = per_element ? first : 0;
  const auto pick = [](int64_t i) { return per_element ? i : 0; };
  const float *m = f.multiplier + at, *b = has_bias ? f.bias + at : nullptr;
  const int32_t* c = std::is_integral_v<Acc> ? f.correction + at : nullptr;
  for (int64_t i = 0; i < count; ++i) {
    float v;
    if constexpr (std::is_integral_v<Acc>)
      v = static_cast<float>(static_cast<int32_t>(acc[i] + static_cast<uint32_t>(c[pick(i)]))) * m[pick(i)];
    else v = acc[i] * m[pick(i)];
    if constexpr (has_bias) v = v + b[pick(i)];
    y[i] = clamp(v, lo, hi);
  }
}

template <bool per_element> void finish_as(const Finish& f) {
  const Epilogue& e = *f.epilogue;
  constexpr int64_t piece = 512;
  alignas(64) float buffer[piece];
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const float lo = e.has_lo ? e.lo : -infinity, hi = e.has_hi ? e.hi : infinity;
  const Quantization quantization(e.out_dtype, e.out_scale, e.out_zero_point);
  const bool in_place = e.out_dtype == DType::f32 && f.out_stride == 4;
  for (int64_t first = 0; first < f.count; first += piece) {
    const int64_t count = f.count - first < piece ? f.count - first : piece;
    char* out = f.out + first * f.out_stride;
    float* const y = in_place ? reinterpret_cast<float*>(out) : buffer;
    if (e.out_dtype == DType::i32) {
      const uint32_t* acc = reinterpret_cast<const uint32_t*>(f.acc) + first;
      const int32_t* c = f.correction + (per_element ? first : 0);
      for (int64_t i = 0; i < count; ++i) {
        const uint32_t sum = acc[i] + static_cast<uint32_t>(c[per_element ? i : 0]);
        std::memcpy(out + i * f.out_stride, &sum, 4);
      }
      continue;
    }
    const bool integers = e.acc_dtype == DType::i32;
    const auto scale = f.bias ? integers ? scale_acc<per_element, uint32_t, true> : scale_acc<per_element, float, true>
                       : integers ? scale_acc<per_element, uint32_t, false>
                                  : scale_acc<per_element, float, false>;
    scale(f, first, count, e.has_residual ? -infinity : lo, e.has_residual ? infinity : hi, y);
    if (e.has_residual) {
      const char* r = f.residual + first * f.residual_stride;
      if (e.residual_dtype == DType::f32)
        add_residual<float>(y, r, f.residual_stride, count, e.residual_zero_point, e.residual_scale);
      else if (e.residual_dtype == DType::u8)
        add_residual<uint8_t>(y, r, f.residual_stride, count, e.residual_zero_point, e.residual_scale);
      else add_residual<int8_t>(y, r, f.residual_stride, count, e.residual_zero_point, e.residual_scale);
      for (int64_t i = 0; i < count; ++i) y[i] = clamp(y[i], lo, hi);
    }
    if (e.out_dtype != DType::f32) quantize(y, out, f.out_stride, count, quantization);
    else if (!in_place)
      for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * f.out_stride, y + i, 4);
  }
}

template <class T> f32v load_residual(const char* p) {
  f32v v;
  if constexpr (std::is_same_v<T, float>) std::memcpy(&v, p, sizeof v);
  else {
    const u32v bytes = widen_bytes(reinterpret_cast<const uint8_t*>(p));
    v = __builtin_convertvector(
        std::is_signed_v<T> ? reinterpret_cast<i32v>(bytes ^ 0x80) - 128 : reinterpret_cast<i32v>(bytes), f32v);
  }
  return v;
}

// The same of elements that lie side by side, a vector at a time, which may read a vector past the last sum.
template <class Acc, class Residual, class Out> class Finisher {
 public:
  struct Scaling {
    f32v multiplier, bias;
    u32v correction;
  };

  explicit Finisher(const Finish& f)
      : lo_(Float::splat(f.epilogue->has_lo ? f.epilogue->lo : -infinity)),
        hi_(Float::splat(f.epilogue->has_hi ? f.epilogue->hi : infinity)),
        residual_scale_(Float::splat(f.epilogue->residual_scale)),
        residual_zero_(Float::splat(f.epilogue->residual_zero_point)),
        has_bias_(f.bias),
        quantization_(f.epilogue->out_dtype, f.epilogue->out_scale, f.epilogue->out_zero_point) {}

  // Of `here` sums, at most a vector.
  void operator()(const char* acc, const Scaling& s, const char* residual, char* out, int64_t here) const {
    u32v sum;
    std::memcpy(&sum, acc, sizeof sum);
    f32v y;
    if constexpr (std::is_integral_v<Acc>)
      y = __builtin_convertvector(reinterpret_cast<i32v>(sum + s.correction), f32v);
    else y = reinterpret_cast<f32v>(sum);
    y = y * s.multiplier;
    if (has_bias_) y = y + s.bias;
    if constexpr (!std::is_void_v<Residual>) {
      char tail[lanes * sizeof(Residual)];
      if (here < lanes)
        residual = static_cast<char*>(std::memcpy(tail, residual, static_cast<size_t>(here) * sizeof(Residual)));
      y = y + residual_scale_ * (load_residual<Residual>(residual) - residual_zero_);
    }
    y = y < lo_ ? lo_ : y;  // keeps NaN
    y = y > hi_ ? hi_ : y;
    const auto store = [&](const auto& values) {
      if (here == lanes) std::memcpy(out, &values, sizeof values);
      else std::memcpy(out, &values, static_cast<size_t>(here) * sizeof(Out));
    };
    if constexpr (std::is_same_v<Out, float>) store(y);
    else store(quantization_(y));
  }

 private:
  static constexpr float infinity = std::numeric_limits<float>::infinity();
  f32v lo_, hi_, residual_scale_, residual_zero_;
  bool has_bias_;
  Quantization quantization_;
};

template <class T> constexpr int64_t size_of = sizeof(T);
template <> constexpr int64_t size_of<void> = 0;

// One multiplier serves all.
template <class Acc, class Residual, class Out> void finish_plain(const Finish& f) {
  const Finisher<Acc, Residual, Out> finisher(f);
  const typename Finisher<Acc, Residual, Out>::Scaling scaling{
      Float::splat(*f.multiplier), Float::splat(f.bias ? *f.bias : 0),
      splat_bits(f.correction ? static_cast<uint32_t>(*f.correction) : 0)};
  const int64_t count = f.count, run = f.run ? f.run : count + lanes, skip = f.run_stride - run * 4;
  const char* acc = f.acc;
  for (int64_t i = 0, left = run; i < count; i += lanes, acc += vector_bytes) {
    finisher(acc, scaling, f.residual + i * size_of<Residual>, f.out + i * size_of<Out>,
             count - i < lanes ? count - i : lanes);
    left -= lanes;
    if (left == 0) left = run, acc += skip;
  }
}

// Each element has its own, for all of f.outputs.
template <class Acc, class Residual, class Out> void finish_elements(const Finish& f) {
  const Finisher<Acc, Residual, Out> finisher(f);
  for (int64_t i = 0; i < f.count; i += lanes) {
    const int64_t here = f.count - i < lanes ? f.count - i : lanes;
    typename Finisher<Acc, Residual, Out>::Scaling scaling{};
    const auto load = [&](auto& to, const auto* from) {
      if (from) std::memcpy(&to, from + i, static_cast<size_t>(here) * 4);
    };
    load(scaling.multiplier, f.multiplier);
    load(scaling.bias, f.bias);
    load(scaling.correction, f.correction);
    const char *acc = f.acc + i * 4, *residual = f.residual + i * size_of<Residual>;
    char* out = f.out + i * size_of<Out>;
    for (int64_t o = 0; o < f.outputs; ++o, acc += f.acc_step, out += f.out_step) {
      finisher(acc, scaling, residual, out, here);
      if constexpr (!std::is_void_v<Residual>) residual += f.residual_step;
    }
  }
}

template <class Acc, class Residual, class Out> void finish_vectors(const Finish& all) {
  if (all.per_element) return finish_elements<Acc, Residual, Out>(all);
  Finish f = all;
  for (int64_t o = 0; o < all.outputs; ++o, f.next_output()) finish_plain<Acc, Residual, Out>(f);
}
template <class Acc, class Residual> void finish_to(const Finish& f) {
  f.epilogue->out_dtype == DType::f32 ? finish_vectors<Acc, Residual, float>(f)
                                      : finish_vectors<Acc, Residual, char>(f);
}
template <class Acc> void finish_side_by_side(const Finish& f) {
  if (!f.epilogue->has_residual) return finish_to<Acc, void>(f);
  switch (f.epilogue->residual_dtype) {
    case DType::u8: return finish_to<Acc, uint8_t>(f);
    case DType::i8: return finish_to<Acc, int8_t>(f);
    default: return finish_to<Acc, float>(f);
  }
}

void finish(const Finish& all) {
  const Epilogue& e = *all.epilogue;
  const auto bytes = [](DType d) { return d == DType::f32 ? 4 : 1; };
  if (e.out_dtype != DType::i32 && all.out_stride == bytes(e.out_dtype) &&
      (!e.has_residual || all.residual_stride == bytes(e.residual_dtype)))
    return e.acc_dtype == DType::i32 ? finish_side_by_side<uint32_t>(all) : finish_side_by_side<float>(all);
  Finish f = all;
  for (int64_t o = 0; o < all.outputs; ++o, f.next_output()) f.per_element ? finish_as<true>(f) : finish_as<false>(f);
}

// Calls at(i) for vectors of `step` elements that cover [0, count), the last of them within it: some elements twice.
template <class At> void for_vectors(int64_t count, int64_t step, At at) {
  for (int64_t i = 0; i + step < count; i += step) at(i);
  at(count < step ? 0 : count - step);
}

template <class T> struct Largest {
  typedef T vec __attribute__((vector_size(vector_bytes)));
  static constexpr int64_t step = vector_bytes / int64_t{sizeof(T)};
  static constexpr T lowest =
      std::is_integral_v<T> ? std::numeric_limits<T>::min() : -std::numeric_limits<T>::infinity();

  static vec load(const T* from, int64_t count = step) {
    vec v = lowest - vec{};
    if (count >= step) std::memcpy(&v, from, sizeof v);
    else std::memcpy(&v, from, static_cast<size_t>(count) * sizeof(T));
    return v;
  }
  static vec of(vec a, vec b) {  // NaN is larger than any number
    const vec m = a > b ? a : b;
    if constexpr (std::is_integral_v<T>) return m;
    else return a != a ? a : m;
  }

  // Of each column of the windows that begin at row `top`, with padding on both sides.
  static void in_columns(const MaxPool& p, int64_t top, T* row) {
    const int64_t width = p.columns.size, padding = p.columns.padding;
    for (int64_t i = 0; i < padding; ++i) row[i] = row[padding + width + i] = lowest;
    for_vectors(width, step, [&](int64_t i) {
      vec v = lowest - vec{};
      for (int64_t r = 0, h = top; r < p.rows.window; ++r, h += p.rows.dilation)
        if (h >= 0 && h < p.rows.size) v = of(load(reinterpret_cast<const T*>(p.map) + h * width + i, width - i), v);
      if (width >= step) std::memcpy(row + padding + i, &v, sizeof v);
      else std::memcpy(row + padding, &v, static_cast<size_t>(width) * sizeof(T));
    });
  }

  // Of neighboring columns, of which every stride-th is wanted.
  static void in_rows(const MaxPool& p, const T* row, T* pooled, T* out) {
    const auto largest = [&](int64_t i) {
      vec v = load(row + i);
      for (int64_t s = 1; s < p.columns.window; ++s) v = of(load(row + i + s * p.columns.dilation), v);
      return v;
    };
    const int64_t count = p.columns.count, stride = p.columns.stride;
    if (stride == 2) {  // the lower halves of pairs
      using Pair = std::conditional_t<sizeof(T) == 1, uint16_t, uint64_t>;
      using Half = std::conditional_t<sizeof(T) == 1, uint8_t, uint32_t>;
      typedef Pair pairs __attribute__((vector_size(vector_bytes)));
      typedef Half halves __attribute__((vector_size(vector_bytes / 2)));
      for_vectors(count, step / 2, [&](int64_t i) {
        const halves v = __builtin_convertvector(reinterpret_cast<pairs>(largest(2 * i)), halves);
        if (count >= step / 2) std::memcpy(out + i, &v, sizeof v);
        else std::memcpy(out, &v, static_cast<size_t>(count) * sizeof(T));
      });
      return;
    }
    for (int64_t i = 0; i <= stride * (count - 1); i += step) {
      const vec v = largest(i);
      std::memcpy(pooled + i, &v, sizeof v);
    }
    for_elements<T>(reinterpret_cast<const char*>(pooled), stride * int64_t{sizeof(T)}, count,
                    [=](int64_t i, T x) { out[i] = x; });
  }
};

// Columns of a few rows of windows first: a load of what two stores have just written waits for both.
template <class T> void max_pool_of(const MaxPool& p) {
  T *const pooled = reinterpret_cast<T*>(p.scratch), *const rows = pooled + p.row_elements();
  T* out = reinterpret_cast<T*>(p.out);
  for (int64_t first = 0; first < p.rows.count; first += p.together()) {
    const int64_t left = p.rows.count - first, count = left < p.together() ? left : p.together();
    for (int64_t i = 0; i < count; ++i)
      Largest<T>::in_columns(p, (first + i) * p.rows.stride - p.rows.padding, rows + i * p.row_elements());
    for (int64_t i = 0; i < count; ++i, out += p.columns.count)
      Largest<T>::in_rows(p, rows + i * p.row_elements(), pooled, out);
  }
}

void max_pool(const MaxPool& p) {
  switch (p.dtype) {
    case DType::u8: return max_pool_of<uint8_t>(p);
    case DType::i8: return max_pool_of<int8_t>(p);
    default: return max_pool_of<float>(p);
  }
}

// Of the elements of the window that begins at `start`: those within the map.
struct Inside {
  int64_t begin, end;
  Inside(const MaxPool::Axis& a, int64_t start)
      : begin(start < 0 ? (-start + a.dilation - 1) / a.dilation : 0),
        end(start < a.size ? (a.size - start + a.dilation - 1) / a.dilation : 0) {
    if (end > a.window) end = a.window;
  }
};

// In the order of max_pool, for the signs of zeros.
template <class T> void max_pool_pixels_of(const MaxPoolPixels& p) {
  const MaxPool::Axis &rows = p.rows, &columns = p.columns;
  const int64_t top = p.row * rows.stride - rows.padding;
  const Inside r(rows, top);
  char* out = p.out;
  for (int64_t column = 0; column < columns.count; ++column, out += p.out_stride) {
    const int64_t left = column * columns.stride - columns.padding;
    const Inside s(columns, left);
    for (int64_t at = 0; at < p.channel_bytes; at += vector_bytes) {
      const auto lowest = Largest<T>::lowest - typename Largest<T>::vec{};
      auto v = lowest;
      for (int64_t i = s.begin; i < s.end; ++i) {
        const char* const map_column = p.image + (left + i * columns.dilation) * p.stride_w + at;
        auto largest = lowest;
        for (int64_t j = r.begin; j < r.end; ++j)
          largest = Largest<T>::of(
              Largest<T>::load(reinterpret_cast<const T*>(map_column + (top + j * rows.dilation) * p.stride_h)),
              largest);
        v = Largest<T>::of(largest, v);
      }
      std::memcpy(out + at, &v, sizeof v);
    }
  }
}

void max_pool_pixels(const MaxPoolPixels& p) {
  switch (p.dtype) {
    case DType::u8: return max_pool_pixels_of<uint8_t>(p);
    case DType::i8: return max_pool_pixels_of<int8_t>(p);
    default: return max_pool_pixels_of<float>(p);
  }
}

}  // namespace
}  // namespace pycodesign::repetition

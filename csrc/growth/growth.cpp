#include "growth/growth.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "core/aligned_buffer.h"
#include "core/cpu.h"
#include "core/half.h"
#include "core/thread_pool.h"
#include "growth/kernels.h"

namespace pycodesign::growth {

const Kernels& kernels() {
  static const auto table = [] {
    std::array<Kernels, 2> all{};
    for (auto& k : all) fill_scalar(k);
#if defined(__x86_64__)
    const auto supported = core::supported_isas();
    if (supported.back() >= core::Isa::avx2) fill_avx2(all[1]);
#endif
    return all;
  }();
  return table[core::active_isa() >= core::Isa::avx2];
}

namespace {

constexpr int64_t lanes = 4;               // source rows that are gathered from at once
constexpr int64_t shortest_run = 28;       // elements on average, from which copying run by run is faster
constexpr int64_t block_columns = 256;     // gathered at once: they stay in the first cache until they are written
constexpr int64_t most_cached = 16 << 20;  // of the result: a virtual machine sees the cache of cores that others use
constexpr int64_t chunks_per_thread = 8;
constexpr int64_t chunk_bytes = 64 << 10;  // of the result; less is not worth another thread

// How an element is stored, and as what it is multiplied.
template <class T> struct Same {
  using Stored = T;
  using Value = T;
  static T load(T stored) { return stored; }
};
struct Float16 {
  using Stored = uint16_t;
  using Value = float;
  static float load(uint16_t bits) { return core::from_float16(bits); }
  static const HalfKernels& loops() { return kernels().f16; }
};
struct BFloat16 {
  using Stored = uint16_t;
  using Value = float;
  static float load(uint16_t bits) { return core::from_bfloat16(bits); }
  static const HalfKernels& loops() { return kernels().bf16; }
};

int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::bytes1: return 1;
    case DType::bytes2:
    case DType::f16:
    case DType::bf16: return 2;
    case DType::bytes4:
    case DType::f32: return 4;
    default: return 8;
  }
}

struct Run {
  int32_t from, to, length;  // elements; from -1: zeros
};

// A row of the result in elements, trailing dimensions included.
struct Columns {
  int64_t inputs;                // elements of a source row
  std::vector<int32_t> sources;  // for each element of the result; `inputs`: zero
  std::vector<Run> runs;         // the same
};

struct Row {
  int64_t source, output;  // source -1: zeros
};

[[noreturn]] void refuse(const char* name, int64_t size, int64_t got) {
  throw std::invalid_argument(std::string(name) + ": expected indices from -1 to " + std::to_string(size - 1) +
                              ", got " + std::to_string(got));
}

Columns plan_columns(const Expansion& x) {
  const int64_t inner = x.shape[2] * x.shape[3], outputs = x.columns * inner;
  Columns columns{x.shape[1] * inner, {}, {}};
  if (std::max(columns.inputs, outputs) >= std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("w: expected rows of fewer than 2^31 elements, got " +
                                std::to_string(std::max(columns.inputs, outputs)));
  columns.sources.reserve(static_cast<size_t>(outputs));
  for (int64_t c = 0; c < x.columns; ++c) {
    const int64_t index = x.in_index ? x.in_index[c] : c;
    if (index < -1 || index >= x.shape[1]) refuse("in_index", x.shape[1], index);
    for (int64_t i = 0; i < inner; ++i) {
      const int32_t to = static_cast<int32_t>(c * inner + i);
      const int32_t from = index < 0 ? -1 : static_cast<int32_t>(index * inner + i);
      columns.sources.push_back(index < 0 ? static_cast<int32_t>(columns.inputs) : from);
      Run* last = columns.runs.empty() ? nullptr : &columns.runs.back();
      if (last && from == (last->from < 0 ? -1 : last->from + last->length)) {
        ++last->length;
      } else {
        columns.runs.push_back({from, to, 1});
      }
    }
  }
  return columns;
}

// Output rows in the order of their source rows, so that each source row is gathered once. A counting sort.
std::vector<Row> plan_rows(const Expansion& x) {
  const std::vector<int64_t> index(x.out_index, x.out_index + x.rows);
  std::vector<int64_t> place(static_cast<size_t>(x.shape[0]) + 2);  // source s is counted at s + 2
  for (const int64_t source : index) {
    if (source < -1 || source >= x.shape[0]) refuse("out_index", x.shape[0], source);
    ++place[static_cast<size_t>(source + 2)];
  }
  for (size_t i = 1; i < place.size(); ++i) place[i] += place[i - 1];  // now rows of source s begin at place[s + 1]
  std::vector<Row> rows(index.size());
  for (size_t r = 0; r < index.size(); ++r)
    rows[static_cast<size_t>(place[static_cast<size_t>(index[r] + 1)]++)] = {index[r], static_cast<int64_t>(r)};
  return rows;
}

// Four bytes are four bytes to a shuffle.
template <class V> const float* as_floats(const V* values) { return reinterpret_cast<const float*>(values); }
template <class V> float* as_floats(V* values) { return reinterpret_cast<float*>(values); }

// dst[i * step] = element i of the row that begins at src.
template <class E>
void stage_row(const Expansion& x, const char* src, typename E::Value* __restrict dst, int64_t step) {
  for (int64_t c = 0; c < x.shape[1]; ++c)
    for (int64_t i = 0; i < x.shape[2]; ++i) {
      const char* from = src + c * x.stride[1] + i * x.stride[2];
      for (int64_t j = 0; j < x.shape[3]; ++j, dst += step, from += x.stride[3])
        *dst = E::load(*reinterpret_cast<const typename E::Stored*>(from));
    }
}

// quads[i][l] = rows[l][i]
template <class V> void interleave(const std::array<const V*, lanes>& rows, int64_t n, V* __restrict quads) {
  int64_t i = 0;
  if constexpr (sizeof(V) == sizeof(float)) {
    const std::array<const float*, lanes> sources{as_floats(rows[0]), as_floats(rows[1]), as_floats(rows[2]),
                                                  as_floats(rows[3])};
    i = kernels().interleave(sources.data(), n, as_floats(quads));
  }
  for (; i < n; ++i)
    for (size_t l = 0; l < lanes; ++l) quads[lanes * static_cast<size_t>(i) + l] = rows[l][i];
}

// The same from rows as they are stored, elements that follow one another.
template <class E>
void stage_rows(const std::array<const char*, lanes>& rows, int64_t inputs, typename E::Value* __restrict quads) {
  using Stored = typename E::Stored;
  using Value = typename E::Value;
  std::array<const Value*, lanes> values{};
  if constexpr (std::is_same_v<Stored, Value>) {
    for (size_t l = 0; l < lanes; ++l) values[l] = reinterpret_cast<const Value*>(rows[l]);
    interleave(values, inputs, quads);
  } else {
    constexpr int64_t most = 256;
    alignas(64) Value wide[lanes][most];
    for (size_t l = 0; l < lanes; ++l) values[l] = wide[l];
    for (int64_t i = 0; i < inputs; i += most) {
      const int64_t n = std::min(most, inputs - i);
      for (size_t l = 0; l < lanes; ++l) E::loops().widen(reinterpret_cast<const Stored*>(rows[l]) + i, n, wide[l]);
      interleave(values, n, quads + lanes * i);
    }
  }
}

template <class V> V scaled(V value, const V* scale, int64_t i) {
  if constexpr (std::is_floating_point_v<V>) return value * scale[i];
  return value;
}

// result[l * n + i] = quads[sources[i]][l] * scale[i]
template <class V>
void gather(const V* quads, const int32_t* sources, const V* scale, int64_t n, V* __restrict result) {
  constexpr int64_t most = 256;
  alignas(64) V block[most * lanes];
  int64_t begin = 0;
  if constexpr (sizeof(V) == sizeof(float))
    begin = kernels().gather(as_floats(quads), sources, std::is_same_v<V, float> ? as_floats(scale) : nullptr, n,
                             as_floats(result));
  for (; begin < n; begin += most) {
    const int64_t count = std::min(most, n - begin);
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(block + lanes * i, quads + lanes * static_cast<int64_t>(sources[begin + i]), sizeof(V) * lanes);
    V *a = result + begin, *b = a + n, *c = b + n, *d = c + n;
    for (int64_t i = 0; i < count; ++i) {
      a[i] = scaled(block[lanes * i], scale, begin + i);
      b[i] = scaled(block[lanes * i + 1], scale, begin + i);
      c[i] = scaled(block[lanes * i + 2], scale, begin + i);
      d[i] = scaled(block[lanes * i + 3], scale, begin + i);
    }
  }
}

// Zeros where a run has them, what `copy` writes elsewhere.
template <class T, class Copy> void copy_runs(const std::vector<Run>& runs, T* result, Copy copy) {
  for (const Run& run : runs) {
    T* to = result + run.to;
    if (run.from < 0) {
      std::memset(to, 0, sizeof(T) * static_cast<size_t>(run.length));
    } else {
      copy(run, to);
    }
  }
}

// Whole cache lines go past the caches.
void stream(char* to, const char* from, size_t bytes) {
  const size_t head = std::min<size_t>(bytes, -reinterpret_cast<uintptr_t>(to) & 63), lines = (bytes - head) / 64;
  std::memcpy(to, from, head);
  kernels().stream(to + head, from + head, lines);
  const size_t done = head + 64 * lines;
  std::memcpy(to + done, from + done, bytes - done);
}

// The work of one call, for one kind of elements.
template <class E> class Expander {
  using Stored = typename E::Stored;
  using Value = typename E::Value;
  static constexpr bool is_same = std::is_same_v<Stored, Value>;

 public:
  Expander(const Expansion& x, const Columns& columns, const std::vector<Row>& rows)
      : x_(x), columns_(columns), rows_(rows), outputs_(static_cast<int64_t>(columns.sources.size())) {
    const int64_t inner = x.shape[2] * x.shape[3], size = sizeof(Stored), bytes = outputs_ * size * x.rows;
    const auto* in_scale = static_cast<const Value*>(x.in_scale);
    if constexpr (std::is_floating_point_v<Value>)
      for (int64_t i = 0; i < outputs_; ++i) {
        const bool is_missing = columns.sources[static_cast<size_t>(i)] == columns.inputs;
        scale_.push_back(in_scale && !is_missing ? in_scale[i / inner] : Value(1));
        if (is_missing) missing_.push_back(i);
      }
    is_contiguous_ = x.stride[3] == size && x.stride[2] == size * x.shape[3] && x.stride[1] == size * inner;
    const auto runs = static_cast<int64_t>(columns.runs.size());
    by_runs_ = x.rows < lanes || runs * shortest_run <= outputs_;
    is_identity_ = is_same && is_contiguous_ && !in_scale && runs == 1 && columns.runs[0].from == 0;
    streams_ = bytes > std::min(most_cached, static_cast<int64_t>(core::cache_sizes().l3 / 2));
    const bool shares_lines = streams_ && (reinterpret_cast<uintptr_t>(x.out) % 64 || x.row_stride % 64);
    block_ = by_runs_ || shares_lines ? outputs_ : std::min(outputs_, block_columns);
  }

  // Computes rows [begin, end) of the plan.
  void run(int64_t begin, int64_t end) const {
    const int64_t width = by_runs_ ? 1 : lanes;
    core::AlignedBuffer<Value> staged(static_cast<size_t>(width * (columns_.inputs + 1)));
    core::AlignedBuffer<Value> results(static_cast<size_t>(width * block_));
    core::AlignedBuffer<Stored> stored(static_cast<size_t>(width * block_));
    std::fill_n(staged.data() + width * columns_.inputs, width, Value(0));  // what index -1 reads

    int64_t r = begin;
    for (; r < end && row(r).source < 0; ++r)
      std::memset(x_.out + row(r).output * x_.row_stride, 0, sizeof(Stored) * static_cast<size_t>(outputs_));
    while (r < end) {
      std::array<const char*, lanes> from{};
      int64_t used = 0, last = r;
      for (; last < end; ++last) {
        if (last > r && row(last).source == row(last - 1).source) continue;
        if (used == width) break;
        from[static_cast<size_t>(used++)] = x_.w + row(last).source * x_.stride[0];
      }
      std::fill(from.begin() + used, from.end(), from[0]);
      if (!by_runs_) stage(from, staged.data());
      for (int64_t c = 0; c < outputs_; c += block_) {
        const int64_t count = std::min(block_, outputs_ - c);
        const Value* values = by_runs_ ? expand_row(from[0], staged.data(), results.data(), stored.data())
                                       : gather_block(staged.data(), c, used, count, results.data(), stored.data());
        write_rows(r, last, c, count, values, stored.data());
      }
      r = last;
    }
    if (streams_) kernels().finish_streams();
  }

 private:
  const Row& row(int64_t r) const { return rows_[static_cast<size_t>(r)]; }

  const Value* expand_row(const char* from, Value* staged, Value* result, Stored* stored) const {
    const Value* source = staged;
    if (!is_contiguous_) {
      stage_row<E>(x_, from, staged, 1);
    } else if constexpr (is_same) {
      source = reinterpret_cast<const Value*>(from);
    } else {
      E::loops().widen(reinterpret_cast<const Stored*>(from), columns_.inputs, staged);
    }
    if (is_identity_) return source;
    if constexpr (!is_same)
      if (!x_.out_scale) {
        copy_runs(columns_.runs, stored, [&](const Run& run, Stored* to) {
          E::loops().scale_each(source + run.from, scale_.data() + run.to, run.length, to);
        });
        return nullptr;
      }
    copy_runs(columns_.runs, result, [&](const Run& run, Value* to) {
      for (int32_t i = 0; i < run.length; ++i) to[i] = scaled(source[run.from + i], scale_.data(), run.to + i);
    });
    return result;
  }

  void stage(const std::array<const char*, lanes>& from, Value* staged) const {
    if (is_contiguous_) return stage_rows<E>(from, columns_.inputs, staged);
    for (int64_t l = 0; l < lanes; ++l) stage_row<E>(x_, from[static_cast<size_t>(l)], staged + l, lanes);
  }

  const Value* gather_block(const Value* staged, int64_t column, int64_t rows, int64_t count, Value* results,
                            Stored* stored) const {
    const Value* scale = scale_.empty() ? nullptr : scale_.data() + column;
    gather(staged, columns_.sources.data() + column, scale, count, results);
    if constexpr (!is_same)
      if (!x_.out_scale) E::loops().scale(results, Value(1), rows * count, stored);
    return results;
  }

  // Rows [begin, end) of the plan from columns [column, column + count); each source has `count` values, or, where its
  // elements are stored otherwise and have no scale, that many in `stored`, which is a line to work in elsewhere.
  void write_rows(int64_t begin, int64_t end, int64_t column, int64_t count, const Value* values,
                  Stored* stored) const {
    int64_t lane = 0;
    for (int64_t r = begin; r < end; ++r) {
      if (r > begin && row(r).source != row(r - 1).source) lane += count;
      char* to = x_.out + row(r).output * x_.row_stride + column * static_cast<int64_t>(sizeof(Stored));
      if constexpr (std::is_floating_point_v<Value>)
        if (x_.out_scale) {
          const Value scale = static_cast<const Value*>(x_.out_scale)[row(r).output];
          Stored* line = streams_ ? stored : reinterpret_cast<Stored*>(to);
          store(values + lane, count, scale, line);
          if (std::signbit(scale)) clear_missing(column, count, line);
          if (streams_) write(stored, count, to);
          continue;
        }
      write(is_same ? static_cast<const void*>(values + lane) : stored + lane, count, to);
    }
  }

  static void store(const Value* values, int64_t n, Value scale, Stored* __restrict to) {
    if constexpr (is_same) {
      for (int64_t i = 0; i < n; ++i) to[i] = values[i] * scale;
    } else {
      E::loops().scale(values, scale, n, to);
    }
  }

  // Elements without a source are +0 whatever the sign of the scale.
  void clear_missing(int64_t column, int64_t count, Stored* line) const {
    auto at = std::lower_bound(missing_.begin(), missing_.end(), column);
    for (; at != missing_.end() && *at < column + count; ++at) std::memset(line + (*at - column), 0, sizeof(Stored));
  }

  void write(const void* stored, int64_t count, char* to) const {
    const size_t bytes = sizeof(Stored) * static_cast<size_t>(count);
    if (streams_) {
      stream(to, static_cast<const char*>(stored), bytes);
    } else {
      std::memcpy(to, stored, bytes);
    }
  }

  const Expansion& x_;
  const Columns& columns_;
  const std::vector<Row>& rows_;
  int64_t outputs_, block_;  // columns, and how many are gathered at once
  std::vector<Value> scale_;
  std::vector<int64_t> missing_;  // columns without a source, ascending
  bool is_contiguous_, by_runs_, is_identity_, streams_;
};

template <class E> void run(const Expansion& x) {
  const Columns columns = plan_columns(x);
  const std::vector<Row> rows = plan_rows(x);
  if (rows.empty() || columns.sources.empty()) return;
  const Expander<E> expander(x, columns, rows);
  const int64_t row_bytes = static_cast<int64_t>(columns.sources.size() * sizeof(typename E::Stored));
  const int64_t most = core::num_threads() == 1 ? 1 : core::num_threads() * chunks_per_thread;
  const int64_t chunks = std::clamp<int64_t>(x.rows * row_bytes / chunk_bytes, 1, std::min(most, x.rows));
  core::parallel_for(chunks,
                     [&](int64_t chunk, int) { expander.run(x.rows * chunk / chunks, x.rows * (chunk + 1) / chunks); });
}

}  // namespace

void expand(const Expansion& given) {
  Expansion x = given;
  int64_t natural = element_bytes(x.dtype);
  for (int d = 3; d > 0; natural *= x.shape[d--])
    if (x.shape[d] == 1) x.stride[d] = natural;  // whatever it was, nobody steps it
  switch (x.dtype) {
    case DType::bytes1: return run<Same<uint8_t>>(x);
    case DType::bytes2: return run<Same<uint16_t>>(x);
    case DType::bytes4: return run<Same<uint32_t>>(x);
    case DType::bytes8: return run<Same<uint64_t>>(x);
    case DType::f16: return run<Float16>(x);
    case DType::bf16: return run<BFloat16>(x);
    case DType::f32: return run<Same<float>>(x);
    case DType::f64: return run<Same<double>>(x);
  }
}

}  // namespace pycodesign::growth

// Convolutions whose weights are indices into a codebook of small kernels: every kernel of a pattern's channels is
// summed once, as an entry of a table, by products or by columns that kernels share; an output adds one entry for each
// pattern.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <stdexcept>

#include "repetition/plan.h"

namespace pycodesign::repetition {

namespace {

constexpr double vector_bytes = 64;

// The columns of all kernels up to sign, and of which ones each is the sum; none where kernels have other values than
// -1, 0 and 1, or another size.
struct KernelColumns {
  std::vector<ColumnPattern> patterns;  // ascending
  std::vector<ColumnTerm> terms;        // [book][kernel][column]
};
KernelColumns columns_of(const Codebook& book, const Geometry& g) {
  const auto& [rows, columns] = g.kernel;
  const auto fits = [](int64_t size, int64_t most) { return 2 <= size && size <= most; };
  if (book.inputs != rows * columns || !fits(rows, max_column_rows) || !fits(columns, max_kernel_columns)) return {};
  const float* const values = book.values;
  const auto small_level = [](float value) { return value == 0 || std::abs(value) == 1; };
  if (!std::all_of(values, values + book.books * book.kernels * book.inputs, small_level)) return {};
  std::vector<ColumnPattern> all;
  KernelColumns found;
  for (int64_t k = 0; k < book.books * book.kernels; ++k)
    for (int64_t s = 0; s < g.kernel[1]; ++s) {
      bool minus;
      all.push_back(
          column_pattern(g.kernel[0], [&](int64_t r) { return values[k * book.inputs + r * g.kernel[1] + s]; }, minus));
      found.terms.push_back({0, minus});
    }
  const std::set<ColumnPattern> distinct(all.begin(), all.end());
  found.patterns.assign(distinct.begin(), distinct.end());
  for (size_t i = 0; i < all.size(); ++i)
    found.terms[i].pattern = static_cast<uint8_t>(std::distance(distinct.begin(), distinct.find(all[i])));
  return found;
}

// Cycles per vector of pixels, with `block` tables alive at a time over tiles of `vectors`.
double block_cost(const Codebook& book, const Geometry& g, int64_t columns, int64_t outputs, double block,
                  double vectors, bool is_float) {
  const auto kernels = static_cast<double>(book.kernels), patterns = static_cast<double>(book.patterns);
  const double sums = tile_cost(vectors, vectors, kernels, block, static_cast<double>(outputs), block, vector_bytes);
  double build = kernels * static_cast<double>(book.inputs) * (is_float ? 1.1 : 2.2);  // products: of 32 bits two
  if (columns) {
    const double term = 1.1;
    const std::vector<ColumnTap> taps = column_taps(g);
    double width = 0;  // vectors of a column's sums, for one of pixels
    for (int phase = 0; phase < static_cast<int>(taps.size()); ++phase)
      if (std::any_of(taps.begin(), taps.end(), [&](const ColumnTap& t) { return t.phase == phase; }))
        width += (vectors + static_cast<double>(phase_reach(taps, phase))) / vectors;
    build =
        term * (kernels * static_cast<double>(g.kernel[1]) + static_cast<double>(columns * (g.kernel[0] + 1)) * width);
  }
  return patterns * (sums / (block * vectors) + build);
}

}  // namespace

CodebookChoice choose_codebook(const Codebook& book, const Geometry& g, int64_t outputs, const Activations& a) {
  constexpr double longer = 1.4;  // than the sums say, beside other algorithms; measured on Zen 3 and Zen 4
  const double times = static_cast<double>(g.groups) * longer;
  CodebookChoice best{1, std::numeric_limits<double>::infinity()};
  const int64_t patterns = book.patterns / book.books;  // tables of one book at a time
  const auto columns = static_cast<int64_t>(columns_of(book, g).patterns.size());
  for (int block = 1; block <= 8 && block <= patterns; ++block)
    for (const double vectors : {4, 6, 8}) {
      const double cost =
          times * block_cost(book, g, columns, outputs / g.groups, block, vectors, a.dtype == DType::f32);
      if (patterns % block == 0 && cost < best.cost) best = {block, cost};
    }
  return best;
}

// Kernels as `dense` takes outputs: [book][block of kernels][channel][tap][dense_outputs]; the stream as that of
// tables, with one slot for a pattern.
void PackedConv2d::pack_codebook(const Weights& w) {
  if (!w.codebook) throw std::invalid_argument("algorithm: expected a codebook for 'codebook', got codes");
  const Codebook& book = *w.codebook;
  const bool is_float = activations_.dtype == DType::f32;
  staging_ = is_float ? Staging::f32 : Staging::centered_i32;
  center_ = activations_.zero_point;
  const CodebookChoice choice = choose_codebook(book, geometry_, w.outputs, activations_);
  cycles_ = choice.cost;
  block_units_ = choice.block;
  group_size_ = static_cast<int>(book.inputs / taps_);
  max_entries_ = static_cast<int>(book.kernels);
  table_units_ = book.patterns;
  unit_slots_ = 1;
  entry_bytes_ = book.kernels > max_table_entries ? 2 : 1;
  book_units_ = book.patterns / book.books;

  KernelColumns columns = columns_of(book, geometry_);
  columns_ = std::move(columns.patterns);
  column_terms_ = std::move(columns.terms);
  const int64_t blocks = block_count(book.kernels);
  if (columns_.empty()) kernels_.assign(static_cast<size_t>(book.books * blocks * book.inputs * dense_outputs), 0);
  for (int64_t b = 0; columns_.empty() && b < book.books; ++b)
    for (int64_t u = 0; u < book.kernels; ++u)
      for (int64_t i = 0; i < book.inputs; ++i) {
        const float value = book.values[(b * book.kernels + u) * book.inputs + i];
        uint32_t& word = kernels_[static_cast<size_t>(
            ((b * blocks + u / dense_outputs) * book.inputs + i) * dense_outputs + u % dense_outputs)];
        if (is_float) std::memcpy(&word, &value, 4);
        else word = static_cast<uint32_t>(static_cast<int32_t>(std::clamp(value, -1e9f, 1e9f)));  // if no output's
      }

  weights_size_ = static_cast<size_t>(w.outputs * book.patterns * entry_bytes_);
  char* stream = weights_.reserve(weights_size_);
  set_correction(w, center_);
  for (int64_t o = 0; o < w.outputs; ++o)
    for (int64_t unit = 0; unit < table_units_; ++unit) {
      const bool minus = book.sign[o * book.patterns + unit] < 0;
      const int e = book.index[o * book.patterns + unit];
      char* at = stream + stream_at(o, unit) * entry_bytes_;
      if (entry_bytes_ == 1) *at = static_cast<char>(e | minus << 7);
      else {
        const auto entry = static_cast<uint16_t>(e | minus << 15);
        std::memcpy(at, &entry, 2);
      }
      if (!is_float) correction_[static_cast<size_t>(o)] += minus;  // -t is ~t + 1
    }
}

// Indices and signs (outputs, patterns), as packed.
std::pair<std::vector<uint8_t>, std::vector<int8_t>> PackedConv2d::indices() const {
  std::vector<uint8_t> index;
  std::vector<int8_t> sign;
  for (int64_t o = 0; o < outputs_; ++o)
    for (int64_t unit = 0; unit < table_units_; ++unit) {
      const char* at = weights_.data() + stream_at(o, unit) * entry_bytes_;
      uint16_t entry = 0;
      std::memcpy(&entry, at, static_cast<size_t>(entry_bytes_));
      const int top = entry_bytes_ == 1 ? 0x80 : 0x8000;
      index.push_back(static_cast<uint8_t>(entry & (top - 1)));
      sign.push_back(entry & top ? -1 : 1);
    }
  return {std::move(index), std::move(sign)};
}

// The tables of `units` patterns from `first` on, over the vectors of one tile.
void PackedConv2d::build_kernels(const Kernels& k, const LiftPlan& lift, const char* x, int64_t first, int64_t units,
                                 int vectors, char* column_sums, char* tables) const {
  const int64_t bytes = k.lanes * 4, entry_bytes = lift.tables.width * bytes,
                block_words = group_size_ * taps_ * dense_outputs, blocks = block_count(max_entries_);
  x += first * group_size_ * lift.unit_bytes;
  if (!columns_.empty()) {
    for (int64_t u = 0; u < units; ++u, x += lift.unit_bytes, tables += max_entries_ * entry_bytes)
      add_columns(k, lift, x, (first + u) / book_units_, vectors, column_sums, tables);
    return;
  }
  DenseTile d{};
  const std::span<const int64_t> source = list_sources(lift, group_size_, 1);
  d.source = source.data();
  d.steps = group_size_ * taps_;
  d.acc_stride = entry_bytes;
  d.first = true;
  for (int64_t u = 0; u < units; ++u)
    for (int64_t b = 0; b < blocks; ++b)
      for (int v = 0; v < vectors; v += k.max_dense_vectors) {
        d.x = x + u * group_size_ * lift.unit_bytes + v * bytes;
        d.weights = reinterpret_cast<const char*>(
            &kernels_[static_cast<size_t>(((first + u) / book_units_ * blocks + b) * block_words)]);
        d.acc = tables + (u * max_entries_ + b * dense_outputs) * entry_bytes + v * bytes;
        d.outputs = static_cast<int>(std::min<int64_t>(dense_outputs, max_entries_ - b * dense_outputs));
        d.vectors = std::min(k.max_dense_vectors, vectors - v);
        (staging_ == Staging::f32 ? k.dense_f32 : k.dense_i32)(d);
      }
}

// One table: every column that occurs is summed once, for all kernels that have it.
void PackedConv2d::add_columns(const Kernels& k, const LiftPlan& lift, const char* x, int64_t book, int vectors,
                               char* sums, char* table) const {
  const int64_t bytes = k.lanes * 4, rows = geometry_.kernel[0];
  const std::vector<ColumnTap>& columns = lift.tables.columns;
  KernelTable t{};
  t.step = static_cast<int64_t>(columns_.size()) * bytes;
  t.terms = &column_terms_[static_cast<size_t>(book * max_entries_) * columns.size()];
  t.entries = max_entries_;
  t.columns = static_cast<int>(columns.size());
  t.vectors = vectors;
  t.table = table;
  t.entry_bytes = lift.tables.width * bytes;
  for (size_t s = 0; s < columns.size(); ++s) {
    size_t first = 0;  // column of the same phase
    while (columns[first].phase != columns[s].phase) ++first;
    if (first == s) {
      ColumnSums c{};
      for (int64_t r = 0; r < rows; ++r) c.row[r] = x + lift.tap_source[static_cast<size_t>(r) * columns.size() + s];
      c.patterns = columns_.data()->data();
      c.count = static_cast<int64_t>(columns_.size());
      c.vectors = vectors + phase_reach(columns, columns[s].phase);
      c.sums = sums;
      (staging_ == Staging::f32 ? k.sum_columns_f32 : k.sum_columns_i32)(c);
      t.sums[s] = sums;
      sums += c.vectors * t.step;
    } else {
      t.sums[s] = t.sums[first] + columns[s].shift * t.step;
    }
  }
  (staging_ == Staging::f32 ? k.add_columns_f32 : k.add_columns_i32)(t);
}

}  // namespace pycodesign::repetition

// delta_linear: what is shared first (x transposed, x A^T), then blocks of outputs, one task after the other.
#include <algorithm>
#include <array>

#include "core/cpu.h"
#include "core/divide.h"
#include "core/thread_pool.h"
#include "sharing/kernels.h"

namespace pycodesign::sharing {

const Kernels& kernels() {
  static const auto table = [] {
    std::array<Kernels, 3> all{};
    for (auto& k : all) fill_scalar(k);
#if defined(__x86_64__)
    const auto best = core::supported_isas().back();
    if (best >= core::Isa::avx2)
      for (size_t i = 1; i < 3; ++i) fill_avx2(all[i]);
    if (best >= core::Isa::avx512) fill_avx512(all[2]);
#endif
    return all;
  }();
  const core::Isa isa = core::active_isa();
  return table[isa >= core::Isa::avx512 ? 2 : isa >= core::Isa::avx2 ? 1 : 0];
}

namespace {

constexpr int64_t few_tokens = 2;                  // up to which each takes its own way through the entries
constexpr int64_t staged_inputs = 256;             // transposed at once
constexpr int64_t chunk_blocks = 4;                // blocks of outputs that a thread takes at once
constexpr int64_t few_inputs = 32, few_rows = 12;  // of products that are little work
constexpr int64_t piece_outputs = 64;
constexpr int64_t line_floats = core::cache_line / sizeof(float);
constexpr int64_t units_per_thread = 4;
constexpr int64_t fewest_products = 1 << 15;  // less is not worth another thread

using core::divide_up, core::round_up;

float* scratch(int which, int64_t size) {
  thread_local core::AlignedBuffer<float> buffers[3];
  return buffers[which].reserve(static_cast<size_t>(size));
}

// Tokens [first, first + count) of every task; width 1: each by itself, others: side by side.
struct Tokens {
  int64_t first, count, width;
  int64_t staged() const { return width == 1 ? count : width; }
};

std::vector<Tokens> cut_tokens(int64_t tokens, int64_t widest_tile) {
  std::vector<Tokens> cuts;
  for (int64_t first = 0; first < tokens;) {
    const int64_t left = tokens - first;
    const int64_t width = left > 48 ? widest_tile : left > 16 ? 32 : left > few_tokens ? 16 : 1;
    cuts.push_back({first, width == 1 ? left : std::min(left, width), width});
    first += cuts.back().count;
  }
  return cuts;
}

// Writes the sums of one block piece by piece, while those of the next are summed: stores wait for memory, sums for the
// caches. What the next piece will write is fetched meanwhile, in step itself: GCC drops calls of a function that does
// nothing else.
class Pieces {
 public:
  explicit Pieces(const Kernels& kernels) : kernels_(kernels), piece_tokens_(kernels.widest_tile / 4) {}

  // After all pieces of the block before it.
  void begin(const FinishedTile& tile) {
    finish();
    tile_ = tile;
    token_ = output_ = 0;
  }

  // Outputs one after the other, so that the processor sees where the next stores go.
  bool step() {
    if (token_ >= tile_.tokens) return false;
    FinishedTile piece = tile_;
    const int64_t lanes = kernels_.lanes;
    piece.sums += token_ / lanes * lanes * block_rows + output_ * lanes + token_ % lanes;
    piece.rows = std::min(piece_outputs, tile_.rows - output_);
    piece.tokens = std::min(piece_tokens_, tile_.tokens - token_);
    if (piece.base) piece.base += token_ * tile_.base_row + output_;
    piece.z += token_ * tile_.z_row + output_;
    kernels_.finish_tile(piece);
    output_ += piece_outputs;
    if (output_ >= tile_.rows) {
      output_ = 0;
      token_ += piece_tokens_;
    }
    for (int64_t t = token_; t < std::min(token_ + piece_tokens_, tile_.tokens); ++t)
      for (int64_t o = output_; o < std::min(output_ + piece_outputs, tile_.rows); o += line_floats)
        __builtin_prefetch(tile_.z + t * tile_.z_row + o, 1);
    return true;
  }

  void finish() {
    while (step()) continue;
  }

 private:
  const Kernels& kernels_;
  const int64_t piece_tokens_;  // of the widest tile as many pieces as a block has groups
  FinishedTile tile_{};
  int64_t token_ = 0, output_ = 0;
};

class Run {
 public:
  explicit Run(const Call& call)
      : call_(call),
        kernels_(kernels()),
        cuts_(cut_tokens(call.tokens, kernels_.widest_tile)),
        tasks_(static_cast<int64_t>(call.tasks.size())),
        outputs_(call.tasks[0]->outputs),
        inputs_(call.tasks[0]->inputs),
        sources_(call.x_task == 0 ? 1 : tasks_) {
    int64_t products = 0, tile_floats = 0, low_floats = 0;
    for (int64_t n = 0; n < tasks_; ++n) {
      const Delta& delta = task(n);
      products += (delta.entries + outputs_) * call.tokens;
      low_at_.push_back(low_floats);
      if (delta.kind == Kind::low_rank) {
        low_floats += call.tokens * low_stride(delta);
        for (int64_t p = 0; p < divide_up(delta.rank, panel_width); ++p) low_panels_.push_back({n, p});
      }
      needs_tiles_ |= delta.kind == Kind::sparse;
    }
    for (const Tokens& cut : cuts_) {
      tile_at_.push_back(tile_floats);
      tile_floats += round_up(cut.staged() * (inputs_ + 1), core::cache_line / sizeof(float));
    }
    source_floats_ = tile_floats;
    tiles_ = scratch(0, needs_tiles_ ? sources_ * tile_floats : 0);
    low_ = scratch(1, low_floats);
    threads_ = products < fewest_products ? 1 : core::num_threads();
  }

  void run() {
    prepare();
    const int64_t blocks = divide_up(outputs_, block_rows), cuts = static_cast<int64_t>(cuts_.size());
    // Few outputs at once, whose part of base is near, and all tokens of a task, whose entries are; less where there
    // are many threads.
    const int64_t items = tasks_ * cuts;
    int64_t chunk = chunk_blocks, group = items;
    const auto units = [&] { return divide_up(blocks, chunk) * divide_up(items, group); };
    if (threads_ > 1)
      while (units() < threads_ * units_per_thread && (chunk > 1 || group > 1)) {
        if (group > 1) group = divide_up(group, 2);
        else chunk = divide_up(chunk, 2);
      }
    const int64_t groups = divide_up(items, group);
    core::parallel_for(
        units(),
        [&](int64_t unit, int) {
          const int64_t block = unit / groups * chunk, item = unit % groups * group;
          compute(item, std::min(items, item + group), block, std::min(blocks, block + chunk));
        },
        threads_);
  }

 private:
  const Delta& task(int64_t n) const { return *call_.tasks[static_cast<size_t>(n)]; }
  const float* x(int64_t n, int64_t token) const { return call_.x + n * call_.x_task + token * call_.x_row; }
  const float* base(int64_t n, int64_t token, int64_t output) const {
    return call_.base ? call_.base + n * call_.base_task + token * call_.base_row + output : nullptr;
  }
  float* z(int64_t n, int64_t token, int64_t output) const {
    return call_.z + n * call_.z_task + token * call_.z_row + output;
  }
  static int64_t low_stride(const Delta& delta) { return divide_up(delta.rank, panel_width) * panel_width; }
  float* low(int64_t n, int64_t token) const {
    return low_ + low_at_[static_cast<size_t>(n)] + token * low_stride(task(n));
  }
  Tile tile(int64_t n, size_t cut) const {
    return {tiles_ + (sources_ == 1 ? 0 : n) * source_floats_ + tile_at_[cut], cuts_[cut].width};
  }

  // Transposes x for sparse tasks, multiplies it by A for those of low rank.
  void prepare() {
    const int64_t cuts = static_cast<int64_t>(cuts_.size()), pieces = divide_up(inputs_, staged_inputs);
    const int64_t staged = needs_tiles_ ? sources_ * cuts * pieces : 0;
    const int64_t group = sources_ == 1 ? most_panels : 1;  // tasks with rows of their own share no product
    const int64_t groups = divide_up(static_cast<int64_t>(low_panels_.size()), group);
    core::parallel_for(
        staged + groups * cuts,
        [&](int64_t unit, int) {
          if (unit < staged) {
            stage(unit / pieces / cuts, static_cast<size_t>(unit / pieces % cuts), unit % pieces * staged_inputs);
          } else {
            const int64_t first = (unit - staged) / cuts * group;
            multiply_down(first, std::min(first + group, static_cast<int64_t>(low_panels_.size())),
                          cuts_[static_cast<size_t>((unit - staged) % cuts)]);
          }
        },
        threads_);
  }

  void stage(int64_t source, size_t cut, int64_t input) const {
    if (sources_ > 1 && task(source).kind != Kind::sparse) return;
    const Tokens& tokens = cuts_[cut];
    const int64_t count = std::min(staged_inputs, inputs_ - input);
    const float* from = x(source, tokens.first) + input;
    float* to = tile(source, cut).data;
    const bool is_last = input + count == inputs_;  // and writes the zeros behind
    if (tokens.width == 1) {
      for (int64_t t = 0; t < tokens.count; ++t) {
        float* row = to + t * (inputs_ + 1);
        std::copy_n(from + t * call_.x_row, count, row + input);
        if (is_last) row[inputs_] = 0;
      }
    } else {
      kernels_.stage_tile(from, call_.x_row, tokens.count, count, {to + input * tokens.width, tokens.width});
      if (is_last) std::fill_n(to + inputs_ * tokens.width, tokens.width, 0.0f);
    }
  }

  void multiply_down(int64_t begin, int64_t end, const Tokens& cut) const {
    while (begin < end) {  // neighbors whose values are kept alike go together
      PanelProduct p{};
      p.storage = task(low_panels_[static_cast<size_t>(begin)].task).storage;
      for (; begin < end; ++begin) {
        const auto [n, panel] = low_panels_[static_cast<size_t>(begin)];
        if (task(n).storage != p.storage) break;
        p.x = x(n, cut.first);
        add_panel(p, task(n).down, panel, p.storage);
        p.out[p.panels] = low(n, cut.first) + panel * panel_width;
        p.out_row[p.panels] = low_stride(task(n));
        p.width[p.panels++] = panel_width;
      }
      p.x_row = call_.x_row;
      p.rows = cut.count;
      p.inputs = inputs_;
      kernels_.multiply_panels(p);
    }
  }

  static void add_panel(PanelProduct& p, const Panels& panels, int64_t index, Storage storage) {
    p.panel[p.panels] = panels.value.data() + index * panels.inputs * panel_width * (storage == Storage::f32 ? 4 : 2);
  }

  // Outputs of blocks [begin, end) for items [first, last): cuts of one task, then of the next.
  void compute(int64_t first, int64_t last, int64_t begin, int64_t end) const {
    const auto cuts = static_cast<int64_t>(cuts_.size());
    const int64_t output = begin * block_rows, rows = std::min(end * block_rows, outputs_) - output;
    const int64_t size = block_rows * std::max(kernels_.widest_tile, chunk_blocks);
    float* sums = scratch(2, 2 * size);
    int64_t buffer = 0;  // of two: the other one's sums are being written
    Pieces pieces(kernels_);
    for (int64_t item = first; item < last; ++item) {
      const int64_t n = item / cuts;
      const auto cut = static_cast<size_t>(item % cuts);
      const auto [token, count, width] = cuts_[cut];
      float* to = sums + buffer * size;
      if (task(n).kind != Kind::sparse) {
        multiply_up(n, cuts_[cut], output, output + rows);
      } else if (width == 1) {
        for (int64_t t = 0; t < count; ++t) {
          for (int64_t block = begin; block < end; ++block)
            kernels_.sum_token(groups_of(n, block), tile(n, cut).data + t * (inputs_ + 1),
                               to + (block - begin) * block_rows);
          kernels_.finish_token(to, rows, base(n, token + t, output), z(n, token + t, output));
        }
      } else {
        for (int64_t block = begin; block < end; ++block) {
          to = sums + buffer * size;
          for_groups(groups_of(n, block), [&](const SparseGroups& groups) {
            kernels_.sum_tile(groups, tile(n, cut), to);
            pieces.step();
          });
          const int64_t first_row = block * block_rows;
          pieces.begin({to, std::min(block_rows, outputs_ - first_row), count, base(n, token, first_row),
                        call_.base_row, z(n, token, first_row), call_.z_row});
          buffer = 1 - buffer;
        }
      }
    }
    pieces.finish();
  }

  // All groups of a block of a task.
  SparseGroups groups_of(int64_t n, int64_t block) const {
    const Delta& delta = task(n);
    const SparseRows& rows = delta.sparse;
    const int64_t at = rows.begin[static_cast<size_t>(block)] * group_rows;
    return {block_rows,
            rows.count.data() + block * block_rows / octet_rows,
            rows.order.data() + block * block_rows,
            rows.index.data() + at,
            rows.value.data() + at * (delta.storage == Storage::f32 ? 4 : 2),
            delta.storage,
            delta.bias.empty() ? nullptr : delta.bias.data() + block * block_rows};
  }

  // Calls use(groups) for one group of a block after the other.
  template <class Use> static void for_groups(SparseGroups groups, Use use) {
    groups.rows = group_rows;
    for (int64_t row = 0; row < block_rows; row += group_rows) {
      use(groups);
      const int64_t slots = groups.count[0] * group_rows;
      groups.count += group_rows / octet_rows;
      groups.order += group_rows;
      groups.index += slots;
      groups.value = static_cast<const char*>(groups.value) + slots * (groups.storage == Storage::f32 ? 4 : 2);
    }
  }

  // Outputs [begin, end) of task n. Where there is little to multiply, a few rows at a time: they are written in order.
  void multiply_up(int64_t n, const Tokens& cut, int64_t begin, int64_t end) const {
    const Delta& delta = task(n);
    const int64_t step = delta.up.inputs <= few_inputs ? few_rows : cut.count;
    for (int64_t token = cut.first; token < cut.first + cut.count; token += step)
      for (int64_t output = begin; output < end;) {
        PanelProduct p{};
        p.storage = delta.storage;
        p.rows = std::min(step, cut.first + cut.count - token);
        p.inputs = delta.up.inputs;
        p.x = delta.kind == Kind::low_rank ? low(n, token) : x(n, token);
        p.x_row = delta.kind == Kind::low_rank ? low_stride(delta) : call_.x_row;
        for (; p.panels < most_panels && output < end; output += panel_width) {
          if (delta.kind != Kind::none) add_panel(p, delta.up, output / panel_width, delta.storage);
          p.bias[p.panels] = delta.bias.empty() ? nullptr : delta.bias.data() + output;
          p.base[p.panels] = base(n, token, output);
          p.base_row[p.panels] = call_.base_row;
          p.out[p.panels] = z(n, token, output);
          p.out_row[p.panels] = call_.z_row;
          p.width[p.panels++] = std::min(panel_width, outputs_ - output);
        }
        kernels_.multiply_panels(p);
      }
  }

  struct LowPanel {
    int64_t task, panel;
  };

  const Call& call_;
  const Kernels& kernels_;
  std::vector<Tokens> cuts_;
  int64_t tasks_, outputs_, inputs_, sources_, source_floats_ = 0;
  bool needs_tiles_ = false;
  std::vector<int64_t> tile_at_, low_at_;  // where the tiles of a cut, the products of a task, lie
  std::vector<LowPanel> low_panels_;       // every panel of an A
  float *tiles_ = nullptr, *low_ = nullptr;
  int threads_ = 1;
};

}  // namespace

void delta_linear(const Call& call) {
  if (call.tasks.empty() || call.tokens == 0) return;
  Run(call).run();
}

}  // namespace pycodesign::sharing

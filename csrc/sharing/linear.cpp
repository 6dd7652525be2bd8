// delta_linear: what is shared first (x transposed, x A^T), then blocks of outputs, one task after the other.
#include <algorithm>
#include <array>

#include "core/cpu.h"
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

constexpr int64_t widest_tile = 64;     // tokens
constexpr int64_t few_tokens = 2;       // up to which each takes its own way through the entries
constexpr int64_t staged_inputs = 256;  // transposed at once
constexpr int64_t chunk_blocks = 8;     // blocks of outputs that a thread takes at once
constexpr int64_t units_per_thread = 8;
constexpr int64_t fewest_products = 1 << 15;  // less is not worth another thread

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

float* scratch(int which, int64_t size) {
  thread_local core::AlignedBuffer<float> buffers[2];
  return buffers[which].reserve(static_cast<size_t>(size));
}

// Tokens [first, first + count) of every task.
struct Tokens {
  int64_t first, count, width;
};

std::vector<Tokens> cut_tokens(int64_t tokens) {
  std::vector<Tokens> cuts;
  for (int64_t first = 0; first < tokens;) {
    const int64_t left = tokens - first;
    const int64_t width = left > 32 ? widest_tile : left > 16 ? 32 : 16;
    cuts.push_back({first, std::min(left, width), width});
    first += cuts.back().count;
  }
  return cuts;
}

class Run {
 public:
  explicit Run(const Call& call)
      : call_(call),
        kernels_(kernels()),
        cuts_(cut_tokens(call.tokens)),
        tasks_(static_cast<int64_t>(call.tasks.size())),
        outputs_(call.tasks[0]->outputs),
        inputs_(call.tasks[0]->inputs),
        sources_(call.x_task == 0 ? 1 : tasks_),
        by_token_(call.tokens <= few_tokens) {
    int64_t products = 0, tile_floats = 0, low_floats = 0;
    for (int64_t n = 0; n < tasks_; ++n) {
      const Delta& delta = task(n);
      products += (delta.entries + outputs_) * call.tokens;
      low_at_.push_back(low_floats);
      if (delta.kind == Kind::low_rank) {
        low_floats += call.tokens * low_stride(delta);
        for (int64_t p = 0; p < divide_up(delta.rank, panel_width); ++p) low_panels_.push_back({n, p});
      }
      needs_tiles_ |= delta.kind == Kind::sparse && !by_token_;
    }
    for (const Tokens& cut : cuts_) {
      tile_at_.push_back(tile_floats);
      tile_floats += cut.width * inputs_;
    }
    source_floats_ = tile_floats;
    tiles_ = scratch(0, needs_tiles_ ? sources_ * tile_floats : 0);
    low_ = scratch(1, low_floats);
    threads_ = products < fewest_products ? 1 : core::num_threads();
  }

  void run() {
    prepare();
    const int64_t blocks = divide_up(outputs_, block_rows), cuts = static_cast<int64_t>(cuts_.size());
    int64_t chunk = chunk_blocks;
    if (threads_ > 1)
      chunk = std::clamp<int64_t>(blocks * cuts * tasks_ / (threads_ * units_per_thread), 1, chunk_blocks);
    const int64_t chunks = divide_up(blocks, chunk);
    // Tasks one after the other on the same outputs: their part of base is read from near.
    core::parallel_for(
        cuts * chunks * tasks_,
        [&](int64_t unit, int) {
          const int64_t n = unit % tasks_, first = unit / tasks_ % chunks * chunk;
          compute(n, static_cast<size_t>(unit / tasks_ / chunks), first, std::min(blocks, first + chunk));
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
    Tile part = tile(source, cut);
    part.data += input * part.width;
    kernels_.stage_tile(x(source, cuts_[cut].first) + input, call_.x_row, cuts_[cut].count,
                        std::min(staged_inputs, inputs_ - input), part);
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

  // Outputs of blocks [begin, end) of task n for some tokens.
  void compute(int64_t n, size_t cut, int64_t begin, int64_t end) const {
    if (task(n).kind == Kind::sparse) {
      for (int64_t block = begin; block < end; ++block) by_token_ ? add_tokens(n, block) : add_tile(n, cut, block);
    } else {
      multiply_up(n, cuts_[cut], begin * block_rows, std::min(end * block_rows, outputs_));
    }
  }

  SparseBlock sparse_block(const Delta& delta, int64_t block) const {
    const SparseRows& rows = delta.sparse;
    const int64_t at = rows.begin[static_cast<size_t>(block)] * group_rows;
    return {rows.count.data() + block * block_rows,
            rows.order.data() + block * block_rows,
            rows.index.data() + at,
            rows.value.data() + at * (delta.storage == Storage::f32 ? 4 : 2),
            delta.storage,
            delta.bias.empty() ? nullptr : delta.bias.data() + block * block_rows};
  }

  void add_tile(int64_t n, size_t cut, int64_t block) const {
    alignas(64) float sums[block_rows * widest_tile];
    const auto [token, count, width] = cuts_[cut];
    const int64_t output = block * block_rows;
    kernels_.sum_tile(sparse_block(task(n), block), tile(n, cut), sums);
    kernels_.finish_block({sums, width, std::min(block_rows, outputs_ - output), count, base(n, token, output),
                           call_.base_row, z(n, token, output), call_.z_row});
  }

  void add_tokens(int64_t n, int64_t block) const {
    const int64_t output = block * block_rows;
    for (int64_t t = 0; t < call_.tokens; ++t)
      kernels_.sum_token(sparse_block(task(n), block), x(n, t), std::min(block_rows, outputs_ - output),
                         base(n, t, output), z(n, t, output));
  }

  void multiply_up(int64_t n, const Tokens& cut, int64_t begin, int64_t end) const {
    const Delta& delta = task(n);
    for (int64_t output = begin; output < end;) {
      PanelProduct p{};
      p.storage = delta.storage;
      p.rows = cut.count;
      p.inputs = delta.up.inputs;
      p.x = delta.kind == Kind::low_rank ? low(n, cut.first) : x(n, cut.first);
      p.x_row = delta.kind == Kind::low_rank ? low_stride(delta) : call_.x_row;
      for (; p.panels < most_panels && output < end; output += panel_width) {
        if (delta.kind != Kind::none) add_panel(p, delta.up, output / panel_width, delta.storage);
        p.bias[p.panels] = delta.bias.empty() ? nullptr : delta.bias.data() + output;
        p.base[p.panels] = base(n, cut.first, output);
        p.base_row[p.panels] = call_.base_row;
        p.out[p.panels] = z(n, cut.first, output);
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
  bool by_token_, needs_tiles_ = false;
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

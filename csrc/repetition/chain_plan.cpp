#include "repetition/chain_plan.h"

#include <algorithm>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#include "core/thread_pool.h"
#include "repetition/plan.h"

namespace pycodesign::repetition {

namespace {

constexpr size_t guard = 128;  // bytes before and after lifted activations, which restaging reads and masks

std::string text(const Chain::Shape& s) {
  return "(" + std::to_string(s[0]) + ", " + std::to_string(s[1]) + ", " + std::to_string(s[2]) + ", " +
         std::to_string(s[3]) + ")";
}

bool holds(const std::vector<int>& values, int value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

// Calls visit(lower) until it lowers nothing: lower(value) clears its mark.
template <class Visit> void settle(std::vector<bool>& marked, const Visit& visit) {
  for (bool changed = true; changed;) {
    changed = false;
    visit([&](int value) {
      const auto v = static_cast<size_t>(value);
      changed |= marked[v];
      marked[v] = false;
    });
  }
}

}  // namespace

// Plans in this order: shapes; convolutions by the grid of lanes that they compute in; who is lifted, who has its
// channels last; bands; memory.
class ChainPlanner {
 public:
  ChainPlanner(const Chain& chain, const Kernels& kernels, const std::vector<Chain::Shape>& inputs)
      : chain_(chain), plan_(std::make_shared<ChainPlan>(kernels)) {
    plan_->shape = shapes(inputs);
    find_grids();
    plan_->layout.assign(value_count(), Layout::plain);
    mark_lifted();
    mark_channels_last();
    cut_grids();
    count_elements();
    plan_memory();
  }
  std::shared_ptr<const ChainPlan> plan() const { return plan_; }

 private:
  using Shape = Chain::Shape;
  using Layout = Chain::Layout;
  using Step = Chain::Step;
  using Kind = Chain::Kind;
  using Grid = std::array<int64_t, 4>;  // images, height, width, lanes; zeros: none

  size_t value_count() const { return chain_.values_.size(); }
  const Shape& shape(int value) const { return plan_->shape[static_cast<size_t>(value)]; }
  const Grid& grid(int value) const { return grid_[static_cast<size_t>(value)]; }
  const ConvCase& conv_case(size_t step) const { return cases_[case_of_[step]]; }
  bool by_rows(size_t step) const { return plan_->layer[step] && conv_case(step).by_rows; }
  bool is_output(int value) const { return holds(chain_.outputs_, value); }

  Shape output_shape(const Step&, const Shape& x) const;
  std::vector<Shape> shapes(const std::vector<Shape>& inputs) const;
  void find_grids();
  bool moves_residual(const Step&) const;
  void mark_lifted();
  void mark_channels_last();
  void cut_grids();
  void count_elements();
  void plan_memory();

  const Chain& chain_;
  std::shared_ptr<ChainPlan> plan_;
  std::map<Grid, std::vector<size_t>> steps_of_;  // convolutions of one grid share their bands
  std::map<Grid, Pitch> pitches_;                 // the widest that one of them needs
  std::vector<Grid> grid_;                        // of each value
  std::vector<ConvCase> cases_;
  std::vector<size_t> case_of_;  // of each step
};

Chain::Shape ChainPlanner::output_shape(const Step& step, const Shape& x) const {
  switch (step.kind) {
    case Kind::conv2d: {
      const Geometry& g = step.conv->geometry();
      if (x[1] != g.channels)
        throw std::invalid_argument("x: expected (N, " + std::to_string(g.channels) +
                                    ", H, W) for a convolution, got " + text(x));
      return {x[0], step.conv->outputs(), g.output_size(0, x[2]), g.output_size(1, x[3])};
    }
    case Kind::linear:
      if (x[1] * x[2] * x[3] != step.linear->inputs())
        throw std::invalid_argument("x: expected " + std::to_string(step.linear->inputs()) +
                                    " values a row for a linear layer, got " + text(x));
      return {x[0], step.linear->outputs(), 1, 1};
    case Kind::add: return x;
    case Kind::avg_pool2d: {
      const auto pixels = [&](size_t axis) {
        const int64_t window = step.pool.kernel[axis];
        return window ? std::min(window, x[axis + 2]) : x[axis + 2];
      };
      if (chain_.dtype(step.x) != DType::f32 && pixels(0) * pixels(1) > std::numeric_limits<int32_t>::max() / 255)
        throw std::invalid_argument("x: expected windows of 8-bit values whose sums fit 32 bits, got " + text(x));
      [[fallthrough]];
    }
    default: return {x[0], x[1], step.pool.output_size(0, x[2]), step.pool.output_size(1, x[3])};
  }
}

std::vector<Chain::Shape> ChainPlanner::shapes(const std::vector<Shape>& inputs) const {
  std::vector<Shape> all(value_count());
  for (size_t i = 0; i < inputs.size(); ++i) all[static_cast<size_t>(chain_.inputs_[i])] = inputs[i];
  for (const Step& s : chain_.steps_) {
    Shape& out = all[static_cast<size_t>(s.out)];
    out = output_shape(s, all[static_cast<size_t>(s.x)]);
    double elements = 1;
    for (const int64_t size : out) elements *= static_cast<double>(size);
    if (elements > 1e15) throw std::bad_alloc();  // before a product of sizes overflows
    if (s.residual >= 0 && all[static_cast<size_t>(s.residual)] != out)
      throw std::invalid_argument(std::string(s.kind == Kind::add ? "b" : "residual") + ": expected the shape " +
                                  text(out) + ", got " + text(all[static_cast<size_t>(s.residual)]));
  }
  return all;
}

void ChainPlanner::find_grids() {
  const std::vector<Step>& steps = chain_.steps_;
  plan_->layer.resize(steps.size());
  plan_->conv.resize(steps.size());
  grid_.resize(value_count());
  case_of_.resize(steps.size());
  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& s = steps[i];
    const Shape &x = shape(s.x), &out = shape(s.out);
    if (s.kind == Kind::add) grid_[static_cast<size_t>(s.out)] = grid(s.x);
    if (s.kind != Kind::conv2d || count(out) == 0) continue;
    plan_->layer[i] = &s.conv->prepared(plan_->kernels);
    case_of_[i] = cases_.size();
    const ConvCase& c = cases_.emplace_back(plan_->layer[i]->conv_case(plan_->kernels, x[0], x[2], x[3]));
    const Grid key{out[0], out[2], out[3], c.word_lanes * c.halves};
    steps_of_[key].push_back(i);
    grid_[static_cast<size_t>(s.out)] = key;
    Pitch& pitch = pitches_[key];
    const Pitch least = c.least_pitch();
    pitch = {std::max(pitch.row, least.row), std::max(pitch.image, least.image)};
  }
}

// Bytes that no caller holds move between lanes and rows where a layer is finished: its residual may lie in the ones
// and its output in the others, unless outputs of nothing but padding share a lane.
bool ChainPlanner::moves_residual(const Step& s) const {
  if (s.kind != Kind::conv2d || !plan_->kernels.lift_bytes || !plan_->kernels.unlift_bytes ||
      element_bytes(s.epilogue.out_dtype) > 1 || element_bytes(s.epilogue.residual_dtype) > 1 ||
      holds(chain_.inputs_, s.residual) || is_output(s.out))
    return false;
  const auto pitch = pitches_.find(grid(s.out));
  return pitch != pitches_.end() && pitch->second.row >= shape(s.out)[3] && pitch->second.image >= shape(s.out)[2];
}

// A value is lifted until a step that touches it cannot have it so.
void ChainPlanner::mark_lifted() {
  const std::vector<Step>& steps = chain_.steps_;
  std::vector<bool> lifted(value_count());
  for (const Step& s : steps)
    lifted[static_cast<size_t>(s.out)] = (s.kind == Kind::conv2d || s.kind == Kind::add) && grid(s.out)[0] > 0 &&
                                         s.epilogue.out_dtype != DType::i32 && !is_output(s.out);
  settle(lifted, [&](const auto& lower) {
    const auto agree = [&](int a, int b) {  // both or neither
      if (lifted[static_cast<size_t>(a)] && lifted[static_cast<size_t>(b)] && grid(a) == grid(b)) return;
      lower(a);
      lower(b);
    };
    for (size_t i = 0; i < steps.size(); ++i) {
      const Step& s = steps[i];
      if (s.kind == Kind::add) agree(s.x, s.out);
      else if (!plan_->layer[i] || !conv_case(i).takes_lifted() || grid(s.x) != grid(s.out)) lower(s.x);
      if (s.residual < 0) continue;
      if (!moves_residual(s)) agree(s.residual, s.out);
      else if (grid(s.residual) != grid(s.out)) lower(s.residual);
    }
  });
  for (size_t v = 0; v < value_count(); ++v)
    if (lifted[v]) plan_->layout[v] = Layout::lifted;
}

// Channels are last until a step cannot have it so: `dense` by rows of channels, pooling and adds can.
void ChainPlanner::mark_channels_last() {
  const std::vector<Step>& steps = chain_.steps_;
  std::vector<bool> last(value_count());
  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& s = steps[i];
    last[static_cast<size_t>(s.out)] = (s.kind == Kind::conv2d ? by_rows(i) : s.kind != Kind::linear) &&
                                       !plan_->has(s.out, Layout::lifted) && s.epilogue.out_dtype != DType::i32 &&
                                       !is_output(s.out);
  }
  settle(last, [&](const auto& lower) {
    const auto pitch = [&](int value) {  // elements from pixel to pixel
      const DType dtype = chain_.dtype(value);
      return pixel_rows(nullptr, shape(value), dtype).stride[3] / element_bytes(dtype);
    };
    const auto is_last = [&](int value) { return value < 0 || last[static_cast<size_t>(value)]; };
    for (size_t i = 0; i < steps.size(); ++i) {
      const Step& s = steps[i];
      const bool is_max = s.kind == Kind::max_pool2d, is_pool = is_max || s.kind == Kind::avg_pool2d;
      if (!is_pool && s.kind != Kind::add && !by_rows(i)) lower(s.x);
      if (is_pool && !is_last(s.x)) lower(s.out);
      if (is_max && (!is_last(s.out) || s.pool.overlaps_much())) lower(s.x), lower(s.out);
      if (s.kind == Kind::add && !(is_last(s.x) && is_last(s.out) && pitch(s.x) == pitch(s.out) &&
                                   (s.residual < 0 || pitch(s.residual) == pitch(s.out))))
        lower(s.x), lower(s.out);
      if (s.residual < 0) continue;
      const bool adds_pixels = s.kind == Kind::add || by_rows(i);
      if (adds_pixels && is_last(s.residual) && is_last(s.out)) continue;
      lower(s.residual);
      if (adds_pixels) lower(s.out);
    }
  });
  for (size_t v = 0; v < value_count(); ++v)
    if (last[v]) plan_->layout[v] = Layout::channels_last;
}

// Into the bands that are cheapest for all convolutions of a grid together.
void ChainPlanner::cut_grids() {
  for (const auto& [key, steps] : steps_of_) {
    const Pitch& pitch = pitches_[key];
    std::vector<ConvCase> together;
    for (const size_t i : steps) {
      ConvCase& c = together.emplace_back(conv_case(i));
      c.lifted_input = plan_->has(chain_.steps_[i].x, Layout::lifted);
      c.lifted_output = plan_->has(chain_.steps_[i].out, Layout::lifted);
    }
    std::vector<int64_t> splits;
    const Cut cut = choose_cut(together, pitch, core::num_threads(), splits);
    for (size_t i = 0; i < steps.size(); ++i)
      plan_->conv[steps[i]] = plan_->layer[steps[i]]->make_plan(together[i], pitch, cut, splits[i]);
  }
}

void ChainPlanner::count_elements() {
  for (size_t v = 0; v < value_count(); ++v) {
    const Shape& s = plan_->shape[v];
    int64_t elements = count(s);
    if (plan_->layout[v] == Layout::channels_last) {
      elements = s[0] * pixel_rows(nullptr, s, chain_.values_[v]).stride[0] / element_bytes(chain_.values_[v]);
    } else if (plan_->layout[v] == Layout::lifted) {
      int64_t vectors = 0;
      for (const LiftPlan& band : plan_->conv[steps_of_[grid_[v]][0]]->bands) vectors += band.segment;
      elements = s[1] * vectors * grid_[v][3];
    }
    plan_->elements.push_back(elements);
  }
}

// Values that are alive at the same time lie apart, each as low as it fits.
void ChainPlanner::plan_memory() {
  struct Place {
    size_t begin, end, last_step;
  };
  const std::vector<Step>& steps = chain_.steps_;
  std::vector<size_t> last_use(value_count());
  for (size_t i = 0; i < steps.size(); ++i)
    for (const int v : {steps[i].x, steps[i].residual, steps[i].out})
      if (v >= 0) last_use[static_cast<size_t>(v)] = i;
  plan_->at.resize(value_count());
  std::vector<Place> places;
  for (size_t i = 0; i < steps.size(); ++i) {
    if (is_output(steps[i].out)) continue;
    const auto v = static_cast<size_t>(steps[i].out);
    const auto stored = static_cast<size_t>(plan_->elements[v] * element_bytes(chain_.values_[v]));
    const size_t bytes = (stored + 2 * guard + 63) / 64 * 64;
    std::erase_if(places, [&](const Place& p) { return p.last_step < i; });
    std::sort(places.begin(), places.end(), [](const Place& a, const Place& b) { return a.begin < b.begin; });
    size_t begin = 0;
    for (const Place& p : places)
      if (begin + bytes <= p.begin) break;
      else begin = std::max(begin, p.end);
    places.push_back({begin, begin + bytes, last_use[v]});
    plan_->at[v] = begin + guard;
    plan_->bytes = std::max(plan_->bytes, begin + bytes);
  }
}

std::shared_ptr<const ChainPlan> plan_chain(const Chain& chain, const Kernels& kernels,
                                            const std::vector<Chain::Shape>& inputs) {
  return ChainPlanner(chain, kernels, inputs).plan();
}

}  // namespace pycodesign::repetition

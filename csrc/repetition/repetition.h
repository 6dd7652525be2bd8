// Quantized layers: w[o, i] = scale[o] * levels[codes[o, i]], packed once, run many times. The public face of this
// family.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "core/aligned_buffer.h"
#include "repetition/kernels.h"

namespace pycodesign::repetition {

enum class Algorithm : uint8_t { codegen, tables, dense, packed, codebook };
const char* algorithm_name(Algorithm);

// Weights by the kernel, borrowed while packing: sign * values of a kernel for each pattern, which is `inputs` inputs
// of an output one after another.
struct Codebook {
  int64_t books, kernels, inputs;  // each book serves patterns / books patterns
  int64_t patterns;
  const uint8_t* index;  // (outputs, patterns)
  const int8_t* sign;    // -1 or 1
  const float* values;   // (books, kernels, inputs)

  float level(int64_t o, int64_t i) const {
    const int64_t pattern = i / inputs, at = o * patterns + pattern, book = pattern / (patterns / books);
    return static_cast<float>(sign[at]) * values[(book * kernels + index[at]) * inputs + i % inputs];
  }
};

// Borrowed while packing.
struct Weights {
  int64_t outputs, inputs;  // inputs of one output: C / groups * R * S
  const uint8_t* codes;     // (outputs, inputs), or null with a codebook
  const float* levels;      // (1 or outputs, level_count), ascending; a codebook of real values has none
  int64_t level_rows, level_count;
  const float* scale;  // (outputs, scale_groups)
  int64_t scale_groups;
  const float* bias;  // (outputs,) or null
  const Codebook* codebook = nullptr;

  float level(int64_t o, int64_t i) const {
    if (codebook) return codebook->level(o, i);
    return levels[(level_rows == 1 ? 0 : o) * level_count + codes[o * inputs + i]];
  }

  // visit(level, how often) until all of inputs [first, last) of output o are counted
  template <class Visit> void visit_levels(int64_t o, int64_t first, int64_t last, Visit visit) const {
    if (codebook) {
      for (int64_t i = first; i < last; ++i) visit(level(o, i), 1);
      return;
    }
    std::array<std::array<int32_t, 256>, 4> counts{};  // four, for codes that follow one another are often the same
    const uint8_t* const row = codes + o * inputs;
    for (; first < last; ++first) ++counts[static_cast<size_t>(first) % 4][row[first]];
    const float* const here = levels + (level_rows == 1 ? 0 : o) * level_count;
    for (size_t code = 0; code < std::min<size_t>(static_cast<size_t>(level_count), 256); ++code) {
      const int32_t count = counts[0][code] + counts[1][code] + counts[2][code] + counts[3][code];
      if (count > 0) visit(here[code], count);
    }
  }
};

struct Activations {
  DType dtype = DType::f32;
  double scale = 1;
  int32_t zero_point = 0;
  int bits = 0;  // the promise that values fit; 0: none
};

struct Geometry {
  int64_t channels, groups;
  std::array<int64_t, 2> kernel, stride, padding, dilation;

  int64_t output_size(int axis, int64_t input) const {  // 0 where the kernel does not fit
    const int64_t span = input + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1;
    return span < 0 ? 0 : span / stride[axis] + 1;
  }
};

// (N, C, H, W), strides in bytes, any strides; or the activations between two layers, in the lanes of their bands.
struct Tensor {
  char* data;
  std::array<int64_t, 4> size, stride;
  bool lifted = false;
};

// Counted per output pixel, as executed.
struct Counts {
  int64_t adds = 0, multiplies = 0, bytes = 0, code_bytes = 0;  // weights as data, and as machine code
};

// What every packed layer holds whatever its algorithm and wherever it runs: enough to finish sums and to give the
// weights back.
class Layer {
 public:
  Layer(const Weights&, const Activations&, Algorithm);
  virtual ~Layer() = default;
  Layer(const Layer&) = delete;
  Layer& operator=(const Layer&) = delete;

  Algorithm algorithm() const { return algorithm_; }
  const Activations& activations() const { return activations_; }
  int64_t outputs() const { return outputs_; }
  int64_t inputs() const { return inputs_; }
  virtual Counts counts() const = 0;

 protected:
  struct Copy {};
  Layer(Copy, const Layer&, Algorithm);                 // the same weights in another form
  void set_correction(const Weights&, int32_t center);  // for sums of level * (x - center)
  int64_t level_bytes() const {
    return static_cast<int64_t>((levels_.size() + multiplier_.size() + bias_.size() + correction_.size()) * 4);
  }
  uint8_t code_of(int64_t o, float level) const;
  float level_of(int64_t o, uint8_t code) const {
    return levels_[static_cast<size_t>((level_rows_ == 1 ? 0 : o) * level_count_ + code)];
  }

  Algorithm algorithm_;
  Activations activations_;
  int64_t outputs_, inputs_, scale_groups_;
  int64_t level_rows_, level_count_;
  std::vector<float> levels_;
  std::vector<float> multiplier_;  // (scale_groups, outputs): float32(input scale * scale)
  std::vector<float> bias_;
  std::vector<int32_t> correction_;  // (scale_groups, outputs): added to integer sums
};

// How many steps sum in 16 bits before they are widened (DenseTile), for each part of each block of outputs.
struct Runs {
  std::vector<uint16_t> lengths;
  std::vector<int64_t> begin;  // of a part

  bool empty() const { return lengths.empty(); }
  const uint16_t* of(int64_t part) const { return lengths.data() + begin[static_cast<size_t>(part)]; }
  int64_t bytes() const {
    return static_cast<int64_t>(lengths.size() * sizeof lengths[0] + begin.size() * sizeof begin[0]);
  }
};

// One that runs on the CPU.
class PackedLayer : public Layer {
 public:
  using Layer::Layer;
  virtual std::vector<uint8_t> codes() const = 0;  // as packed, (outputs, inputs)
  virtual void run(const Tensor& x, const Tensor& out, const Tensor* residual, const Epilogue&) const = 0;
};

struct ConvCase;
struct ConvPlan;
struct Cut;
struct Pitch;
struct LiftPlan;
struct Finish;
class LayerCode;
class PackedLinear;

class PackedConv2d final : public PackedLayer {
 public:
  PackedConv2d(const Weights&, const Geometry&, const Activations&, Algorithm);
  ~PackedConv2d() override;

  // x (N, C, H, W), out and residual (N, O, OH, OW) with sizes checked by the caller; out overlaps neither.
  void run(const Tensor& x, const Tensor& out, const Tensor* residual, const Epilogue&) const override;

  // The same in parts, for a chain of layers. `prepared` is what runs here: this layer, or its tables where no machine
  // code can be made. Of it come the case, and the run of a plan for it; lifted tensors are of the plan's bands.
  const PackedConv2d& prepared(const Kernels&) const;
  ConvCase conv_case(const Kernels&, int64_t images, int64_t height, int64_t width) const;
  std::shared_ptr<ConvPlan> make_plan(const ConvCase&, const Pitch&, const Cut&, int64_t splits) const;
  void run(const ConvPlan&, const Tensor& x, const Tensor& out, const Tensor* residual, const Epilogue&) const;

  const Geometry& geometry() const { return geometry_; }
  int group_size() const { return group_size_; }  // channels that share a table
  int max_entries() const { return max_entries_; }
  // codegen: for vectors of 64 bytes (AVX-512) or 32, whether or not this processor has them; made when first asked for
  const LayerCode& machine_code(bool avx512) const;
  Counts counts() const override;
  std::vector<uint8_t> codes() const override;
  std::pair<std::vector<uint8_t>, std::vector<int8_t>> indices() const;  // codebook: index and sign

 private:
  PackedConv2d(const PackedConv2d&, const Weights&, Algorithm);
  void pack(const Weights&);
  void pack_tables(const Weights&);
  void pack_dense(const Weights&);
  void pack_rows(const Weights&);
  void pack_matrix(const Weights&);
  void pack_codes(const Weights&);
  void pack_codebook(const Weights&);
  struct MatrixPlaces;
  MatrixPlaces matrix_places() const;
  int64_t matrix_together() const;
  std::vector<uint8_t> matrix_codes() const, row_codes() const;
  int64_t stream_at(int64_t output, int64_t unit) const;
  Weights weights_of(const std::vector<uint8_t>& codes) const;  // as packed, for another form
  const LayerCode* code(const Kernels&) const;                  // null where none can be made
  const PackedConv2d& without_code() const;
  std::shared_ptr<const ConvPlan> plan(const Kernels&, int64_t images, int64_t height, int64_t width) const;
  int64_t block_size() const { return matrix_ ? block_outputs : dense_outputs; }
  // Lanes of sums of integers by rows are as many as those of machine code, so that activations can pass between them.
  int halves() const { return staging_ == Staging::halves_i16 || (rows_ && activations_.dtype != DType::f32) ? 2 : 1; }

  struct Call;
  struct Sums;
  void stage(const Call&, const LiftPlan&, int64_t index, char* staged) const;
  void stage_channels(const Call&, const LiftPlan&, int64_t group, int64_t channel, char* to) const;
  Stage stage_of(const Call&, const LiftPlan&, size_t index, int64_t first, int64_t count) const;
  void stage_phase(const Call&, const LiftPlan&, size_t index, int64_t first, int64_t count, char* planes) const;
  void sum_columns(const Call&, const LiftPlan&, const char* planes, char* sums) const;
  void restage_channels(const Call&, const LiftPlan&, int64_t first, int64_t count, char* staged) const;
  void sum(const Call&, const LiftPlan&, const char* staged, int64_t first, int64_t last) const;
  void sum_code(const Call&, const LiftPlan&, const char* staged, int64_t first, int64_t last) const;
  void sum_tables(const Call&, const LiftPlan&, const char* x, int64_t group, int64_t first, int64_t last) const;
  void build_kernels(const Kernels&, const LiftPlan&, const char* x, int64_t first, int64_t units, int vectors,
                     char* column_sums, char* tables) const;
  void add_columns(const Kernels&, const LiftPlan&, const char* x, int64_t book, int vectors, char* sums,
                   char* table) const;
  void sum_dense(const Call&, const LiftPlan&, const char* x, int64_t group, int64_t first, int64_t last) const;
  void sum_matrix(const Call&, const LiftPlan&, const char* x, int64_t group, int64_t first, int64_t last) const;
  void stage_rows(const Call&, const LiftPlan&, int64_t index, char* rows) const;
  void copy_rows(const Call&, const LiftPlan&, int64_t index, char* rows) const;
  void sum_rows(const Call&, const LiftPlan&, const char* rows, int64_t first, int64_t last) const;
  void finish_outputs(const Call&, const LiftPlan&, const Sums&) const;
  void finish_lanes(const Call&, const LiftPlan&, const Sums&, const char* residual, char* out) const;
  Finish finish_of(const Call&, int64_t output) const;

  Geometry geometry_;
  int64_t taps_, group_channels_, group_outputs_;
  int64_t unit_channels_;              // channels per word: 1, 2 as bfloat16, or 4 as bytes
  int64_t units_;                      // staged planes per group of the convolution
  int64_t stage_channels_;             // channels staged at a time,
  int64_t stage_planes_;               // into so many planes
  core::AlignedBuffer<char> weights_;  // dense: [group][block of outputs][unit][tap][dense_outputs] words; tables:
                                       // [group][block][output][slot] bytes; codegen: codes of code_bits_;
                                       // dense for a matrix unit: blocks of codes of code_bits_, 0: of weights
  size_t weights_size_ = 0;
  int64_t blocks_ = 0;  // of block_size() outputs, that threads can share
  double cycles_ = 0;   // predicted, for one vector of sums
  Staging staging_ = Staging::f32;
  int32_t center_ = 0;  // what staging subtracts from integers

  Runs runs_;  // dense: of each block of outputs, or empty

  // dense by rows: inputs are [tap][channel], padded to whole words, and zero may be one more level
  std::unique_ptr<const PackedLinear> rows_;
  int64_t row_channels_ = 0;

  // dense for a matrix unit
  bool matrix_ = false;
  std::vector<char> level_bytes_;  // as in BlockCodes

  // tables: channels in groups of group_size_, `block_units_` tables alive at a time
  int group_size_ = 0, max_entries_ = 0, block_units_ = 0;
  int64_t table_units_ = 0, unit_slots_ = 0;  // slots: entries that an output adds of a table
  std::vector<TableStep> steps_;              // one list for every table of the layer

  // codebook: its kernels are the tables' entries: products, or sums of columns
  std::vector<uint32_t> kernels_;
  std::vector<std::array<int8_t, 3>> columns_;  // as in ColumnSums
  std::vector<ColumnTerm> column_terms_;        // [book][kernel][column of the filter]
  int64_t book_units_ = 0;                      // that share a book
  int entry_bytes_ = 1;                         // of the stream

  // codegen: machine code for each kind of vectors, made when first needed, and tables for where there is none
  int code_bits_ = 0;
  mutable std::unique_ptr<const LayerCode> code_[2];
  mutable std::atomic<const LayerCode*> made_code_[2] = {};  // the same, without the lock
  mutable std::unique_ptr<const PackedConv2d> without_code_;

  mutable std::mutex mutex_;
  mutable std::map<std::array<int64_t, 5>, std::shared_ptr<const ConvPlan>> plans_;
};

class PackedLinear final : public PackedLayer {
 public:
  PackedLinear(const Weights&, const Activations&, Algorithm);
  // x (1, I, 1, T), out and residual (1, O, 1, T): a convolution's view of rows
  void run(const Tensor& x, const Tensor& out, const Tensor* residual, const Epilogue&) const override;

  Counts counts() const override;
  std::vector<uint8_t> codes() const override;

  // The products of one scale group of a panel. Of pixels, `done` hears of some at a time: the first, how many, and
  // where their sums lie until it returns.
  using RowsDone = std::function<void(int64_t first, int64_t count, const char* sums)>;
  void sum_panel(const Kernels&, int64_t panel_group, LinearTile, const RowsDone& done = nullptr) const;
  int64_t words() const { return group_words_ * word_fields(); }  // of `dense`, of one scale group
  float level(int64_t o, uint8_t code) const { return level_of(o, code); }

 private:
  void stage_row(const Tensor& x, int64_t index, int64_t group_bytes, char* to) const;
  void set_lookup();
  uint32_t unit_of(int64_t field) const;
  uint32_t value_code(float level) const;
  template <class Visit> void visit_weights(Visit) const;
  template <class Encode> void pack_words(const Weights&, Encode);
  int64_t word_fields() const;
  void expand(const Kernels&, int64_t panel_group, int64_t word, int64_t words, char* to) const;
  void pack_runs();
  void add_group(const char* sums, char* total, int64_t rows, int64_t panel, int64_t outputs_here, int64_t group,
                 bool integers) const;

  int64_t group_inputs_;  // inputs that share a scale
  int64_t word_inputs_;   // inputs per 32-bit word of weights
  int64_t group_words_;
  int code_bits_ = 0, code_inputs_ = 0, codes_per_word_ = 0, entries_ = 0;
  bool has_triples_ = false;          // packed float: codes of two sums of three inputs
  std::array<uint32_t, 4> places_{};  // packed float: what each of the values counts in a code
  std::vector<float> values_;         // packed: the levels by code
  std::array<int8_t, 64> level_bytes_{};
  Runs runs_;                              // of the words of `dense`, [panel][scale group][part]; or empty
  core::AlignedBuffer<float> digits_;      // packed float: [code_inputs][entries]
  core::AlignedBuffer<uint32_t> weights_;  // [panel][scale group][word][panel_outputs]
  size_t weights_size_ = 0;
};

bool generates_code();  // whether this machine runs `codegen` itself

struct Choice {
  Algorithm algorithm;
  std::string why;
};
// Deterministic, from the cost model in plan.cpp.
Choice choose_conv2d(const Weights&, const Geometry&, const Activations&);
Choice choose_linear(const Weights&, const Activations&);

// Distinct level values over all outputs, ascending.
std::vector<float> distinct_levels(const Weights&);

}  // namespace pycodesign::repetition

// Quantized layers on a GPU: `dense`, matrix products of codes unpacked in registers; `tables` and `codebook`, factored
// sums.
#pragma once

#include <cstddef>
#include <string>

#include "core/cuda.h"
#include "repetition/cuda_kernels.h"
#include "repetition/repetition.h"

namespace pycodesign::repetition::cuda {

using core::cuda::DeviceBuffer;

// Of a device.
struct Limits {
  int multiprocessors;
  std::size_t shared_bytes = 227 << 10;  // of a block
};

// What runs for inputs of one size, and why.
struct Plan {
  bool few_rows = false;
  Shape shape{};
  int splits = 1;
  int64_t staged_bytes = 0, partial_bytes = 0;
  std::string why;
};

// Its weights lie in the memory of the device that was current when it was made.
class DeviceLayer : public Layer {
 public:
  const Geometry& geometry() const { return geometry_; }
  // Of x (N, C, H, W); a linear layer's rows are the pixels of one image (1, I, 1, T).
  virtual Plan plan(const std::array<int64_t, 4>& size) const = 0;
  // `workspace` has the plan's staged and partial bytes, aligned to 16. Queues kernels on the stream.
  virtual void run(const Tensor& x, const Tensor& out, const Tensor* residual, const Epilogue&, char* workspace,
                   void* stream) const = 0;
  virtual std::string describe() const = 0;  // what the kernels do with these weights

 protected:
  DeviceLayer(const Weights&, const Geometry&, const Activations&, Algorithm);
  void upload_epilogue(const Weights&, int32_t center);  // for sums of level * (x - center)
  Output output(const Tensor& out, const Tensor* residual, const Epilogue&) const;
  bool integers() const { return !is_float(activations_.dtype); }

  Geometry geometry_;
  int64_t taps_, group_channels_, group_outputs_;
  DeviceBuffer multipliers_, biases_, corrections_;
};

class DenseLayer final : public DeviceLayer {
 public:
  DenseLayer(const Weights&, const Geometry&, const Activations&, const Limits&);
  Plan plan(const std::array<int64_t, 4>& size) const override;
  void run(const Tensor& x, const Tensor& out, const Tensor* residual, const Epilogue&, char* workspace,
           void* stream) const override;
  std::string describe() const override;
  Counts counts() const override;

 private:
  int parts() const { return static_cast<int>(scale_groups_); }
  int chunk_of(int64_t size) const;  // chunks that hold so many inputs
  void choose_codes(const Weights&);
  std::vector<uint32_t> pack(const Weights&) const;
  std::array<uint16_t, most_terms> split(float level) const;
  uint32_t code_of(const Weights&, int64_t output, int64_t input, int term) const;
  int64_t find_input(int64_t place) const;
  DenseWeights weights() const;
  void run_rows(const Tensor& x, const Output&, void* stream) const;
  Stage make_stage(const Tensor& x, char* workspace) const;
  bool is_staged(const Tensor& x, const Stage&) const;
  Dense make_dense(const Tensor& x, const Stage&, const Output&, const Plan&) const;

  Limits limits_;
  bool gathers_;                      // staging gathers what an output reads
  int64_t part_inputs_;               // of a staged part
  int chunks_, staged_taps_, tiles_;  // chunks of a tap, taps, tiles of a group
  int stages_, segment_stages_;
  int bits_ = 0, terms_ = 1;
  int exponent_ = 0;           // float16: levels times 2^exponent_, which use its range
  std::vector<float> values_;  // levels by code
  Lookup lookup_[most_terms] = {};
  int32_t center_ = 0;
  DeviceBuffer words_;  // on the device
};

// The inputs of an output in patterns, whose sums are computed once for all outputs: `tables`, patterns of few inputs,
// as many as pay; `codebook`, the kernels of a codebook.
class FactoredLayer final : public DeviceLayer {
 public:
  FactoredLayer(const Weights&, const Geometry&, const Activations&, Algorithm);
  Plan plan(const std::array<int64_t, 4>& size) const override;
  void run(const Tensor& x, const Tensor& out, const Tensor* residual, const Epilogue&, char* workspace,
           void* stream) const override;
  std::string describe() const override;
  Counts counts() const override;

 private:
  struct Patterns;
  Patterns list_patterns(const Weights&, int pattern) const;

  int pattern_ = 0, units_ = 0, entries_ = 0, blocks_ = 0;
  int64_t listed_ = 0;  // entries of all units and groups
  DeviceBuffer digits_, codes_;
};

}  // namespace pycodesign::repetition::cuda

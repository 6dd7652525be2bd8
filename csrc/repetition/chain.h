// Layers, with the adds and the pooling between them, in one call. Activations between convolutions of one size stay in
// the lanes that these compute in; nothing is converted, and memory is planned once for each input size.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "repetition/pooling.h"
#include "repetition/repetition.h"

namespace pycodesign::repetition {

struct ChainPlan;

class Chain {
 public:
  using Shape = std::array<int64_t, 4>;  // N, C, H, W

  Chain();
  ~Chain();

  // Each returns the index of the value that it makes; `residual` and `b` may be -1. Callers check that dtypes agree.
  int add_input(DType);
  int add_conv2d(std::shared_ptr<const PackedConv2d>, int x, int residual, const Epilogue&);
  int add_linear(std::shared_ptr<const PackedLayer>, int x, int residual, const Epilogue&);
  int add_max_pool2d(int x, const Pool&);
  // Integers of x mean scale * (x - zero_point). Adding takes b as a residual.
  int add_avg_pool2d(int x, const Pool&, double scale, int32_t zero_point, const Epilogue&);
  int add_add(int a, int b, float scale, int32_t zero_point, const Epilogue&);
  void set_outputs(std::vector<int> values);

  DType dtype(int value) const { return values_.at(static_cast<size_t>(value)); }
  const std::vector<int>& inputs() const { return inputs_; }
  const std::vector<int>& outputs() const { return outputs_; }

  // For the inputs' sizes; throws std::invalid_argument where one does not fit. Settings in force count: make it anew
  // for every call, it is cached.
  std::shared_ptr<const ChainPlan> plan(const std::vector<Shape>& inputs) const;
  static const Shape& shape(const ChainPlan&, int value);
  // Rows of pixels; the lanes that convolutions compute in; pixels of channels, which `dense` by rows reads and writes.
  enum class Layout : uint8_t { plain, lifted, channels_last };
  static Layout layout(const ChainPlan&, int value);
  // Outputs overlap neither inputs nor each other; the elements of an image follow one another.
  void run(const ChainPlan&, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) const;

 private:
  friend class BoundChain;
  friend class ChainPlanner;
  enum class Kind : uint8_t { conv2d, linear, max_pool2d, avg_pool2d, add };
  struct Step {
    Kind kind;
    int x, residual, out;
    Epilogue epilogue;
    std::shared_ptr<const PackedConv2d> conv;
    std::shared_ptr<const PackedLayer> linear;
    Pool pool;
    double scale;
    int32_t zero_point;
  };
  int add_step(Step, DType out);
  std::vector<Tensor> place_values(const ChainPlan&, char* arena) const;
  void run_steps(const ChainPlan&, const std::vector<Tensor>& tensors) const;
  void run_add(const Kernels&, const Step&, const Tensor& a, const Tensor* b, const Tensor& out, int64_t count) const;

  std::vector<DType> values_;
  std::vector<int> inputs_, outputs_;
  std::vector<Step> steps_;

  mutable std::mutex mutex_;
  mutable std::map<std::vector<int64_t>, std::shared_ptr<const ChainPlan>> plans_;
};

// A chain for inputs of fixed sizes, under the settings in force when it is made, with memory of its own. Once the
// threads that run it have their scratch memory, a run takes no lock, allocates nothing and makes no system call.
class BoundChain {
 public:
  BoundChain(std::shared_ptr<const Chain>, const std::vector<Chain::Shape>& inputs);

  const Chain& chain() const { return *chain_; }
  const Chain::Shape& input_shape(size_t index) const { return Chain::shape(*plan_, chain_->inputs().at(index)); }
  const Chain::Shape& output_shape(size_t index) const { return Chain::shape(*plan_, chain_->outputs().at(index)); }
  // Where it reads and writes from now on; of the planned sizes, as for Chain::run.
  void set_input(size_t index, const Tensor& t) { tensors_[static_cast<size_t>(chain_->inputs().at(index))] = t; }
  void set_output(size_t index, const Tensor& t) { tensors_[static_cast<size_t>(chain_->outputs().at(index))] = t; }
  void run() const { chain_->run_steps(*plan_, tensors_); }  // one at a time

 private:
  std::shared_ptr<const Chain> chain_;
  std::shared_ptr<const ChainPlan> plan_;
  core::AlignedBuffer<char> arena_;
  std::vector<Tensor> tensors_;
};

}  // namespace pycodesign::repetition

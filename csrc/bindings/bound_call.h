// A chain with the arrays that it reads and writes.
#pragma once

#include <pybind11/numpy.h>

#include <memory>
#include <vector>

#include "repetition/chain.h"

namespace pycodesign::bindings {

struct BoundCall {
  repetition::BoundChain chain;
  std::vector<pybind11::object> inputs, outputs;  // null: not yet given

  BoundCall(std::shared_ptr<repetition::Chain> chain_, const std::vector<repetition::Chain::Shape>& shapes)
      : chain(std::move(chain_), shapes),
        inputs(chain.chain().inputs().size()),
        outputs(chain.chain().outputs().size()) {}

  void check_complete() const {
    for (const auto* arrays : {&inputs, &outputs})
      for (const pybind11::object& array : *arrays)
        if (!array)
          throw pybind11::value_error("bodies: expected chains with all inputs and outputs set, got one without");
  }
};

}  // namespace pycodesign::bindings

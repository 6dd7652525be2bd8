// From a task's matrices to the form that kernels read.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

#include "core/divide.h"
#include "core/half.h"
#include "sharing/sharing.h"

namespace pycodesign::sharing {
namespace {

using core::round_up;

int64_t value_bytes(Storage storage) { return storage == Storage::f32 ? 4 : 2; }

void put(core::AlignedBuffer<char>& values, int64_t at, float value, Storage storage) {
  if (storage == Storage::f32) {
    std::memcpy(values.data() + 4 * at, &value, 4);
  } else {
    const uint16_t bits = core::to_bfloat16(value);
    std::memcpy(values.data() + 2 * at, &bits, 2);
  }
}

std::shared_ptr<Delta> start(Kind kind, int64_t outputs, int64_t inputs, const float* bias, Storage storage) {
  if (outputs < 1 || inputs < 1)
    throw std::invalid_argument("deltas: expected at least one output and one input, got (" + std::to_string(outputs) +
                                ", " + std::to_string(inputs) + ")");
  auto delta = std::make_shared<Delta>();
  delta->kind = kind;
  delta->storage = storage;
  delta->outputs = outputs;
  delta->inputs = inputs;
  if (bias) {
    delta->bias.assign(bias, bias + outputs);
    delta->bias.resize(static_cast<size_t>(round_up(outputs, block_rows)));
    delta->bytes = 4 * outputs;
  }
  return delta;
}

// Returns its bytes.
int64_t fill_panels(Panels& panels, int64_t outputs, int64_t inputs, const float* w, Storage storage) {
  panels.inputs = inputs;
  const int64_t count = round_up(outputs, panel_width) * inputs, bytes = count * value_bytes(storage);
  std::fill_n(panels.value.reserve(static_cast<size_t>(bytes)), bytes, char{0});
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t i = 0; i < inputs; ++i)
      put(panels.value, (o / panel_width * inputs + i) * panel_width + o % panel_width, w[o * inputs + i], storage);
  return bytes;
}

}  // namespace

const char* kind_name(Kind kind) {
  switch (kind) {
    case Kind::none: return "none";
    case Kind::sparse: return "sparse";
    case Kind::low_rank: return "low_rank";
    case Kind::dense: return "dense";
  }
  return "unknown";
}

DeltaPointer pack_none(int64_t outputs, int64_t inputs, const float* bias) {
  return start(Kind::none, outputs, inputs, bias, Storage::f32);
}

DeltaPointer pack_sparse(int64_t outputs, int64_t inputs, const Entries& entries, const float* bias, Storage storage) {
  const auto delta = start(Kind::sparse, outputs, inputs, bias, storage);
  if (inputs > most_inputs)
    throw std::invalid_argument("deltas: expected at most " + std::to_string(most_inputs) +
                                " inputs of a sparse matrix, got " + std::to_string(inputs));
  std::vector<int64_t> begin(static_cast<size_t>(outputs) + 1);  // of each row among the entries
  for (int64_t e = 0; e < entries.count; ++e) {
    const int32_t row = entries.row[e], column = entries.column[e];
    if (row < 0 || row >= outputs || column < 0 || column >= inputs)
      throw std::invalid_argument("deltas: expected indices within (" + std::to_string(outputs) + ", " +
                                  std::to_string(inputs) + "), got (" + std::to_string(row) + ", " +
                                  std::to_string(column) + ")");
    if (e && (entries.row[e - 1] > row || (entries.row[e - 1] == row && entries.column[e - 1] >= column)))
      throw std::invalid_argument("deltas: expected entries in ascending order, none twice, got others");
    ++begin[static_cast<size_t>(row) + 1];
  }
  std::partial_sum(begin.begin(), begin.end(), begin.begin());

  const int64_t rows = round_up(outputs, block_rows);
  SparseRows& sparse = delta->sparse;
  std::vector<int64_t> count(static_cast<size_t>(rows));
  for (size_t r = 0; r < static_cast<size_t>(outputs); ++r) count[r] = begin[r + 1] - begin[r];
  sparse.order.resize(static_cast<size_t>(rows));
  int64_t slots = 0;  // rows of 16 entries
  for (int64_t first = 0; first < rows; first += block_rows) {
    uint8_t* order = sparse.order.data() + first;
    const int64_t* counts = count.data() + first;
    std::iota(order, order + block_rows, uint8_t{0});
    std::stable_sort(order, order + block_rows, [&](uint8_t a, uint8_t b) { return counts[a] > counts[b]; });
    sparse.begin.push_back(slots);
    for (int64_t l = 0; l < block_rows; l += octet_rows)
      sparse.count.push_back(static_cast<uint32_t>(counts[order[l]]));
    for (int64_t l = 0; l < block_rows; l += group_rows) slots += counts[order[l]];
  }

  const auto places = static_cast<size_t>(slots * group_rows);
  const size_t bytes = places * static_cast<size_t>(value_bytes(storage));
  std::fill_n(sparse.index.reserve(places), places, static_cast<uint16_t>(inputs));
  std::fill_n(sparse.value.reserve(bytes), bytes, char{0});
  for (int64_t l = 0, slot = 0; l < rows; ++l) {
    const auto row = static_cast<size_t>(l / block_rows * block_rows + sparse.order[static_cast<size_t>(l)]);
    for (int64_t j = 0; j < count[row]; ++j) {
      const int64_t from = begin[row] + j, to = (slot + j) * group_rows + l % group_rows;
      sparse.index[static_cast<size_t>(to)] = static_cast<uint16_t>(entries.column[from]);
      put(sparse.value, to, entries.value[from], storage);
    }
    if (l % group_rows == group_rows - 1) slot += sparse.count[static_cast<size_t>((l - group_rows + 1) / octet_rows)];
  }
  delta->entries = entries.count;
  delta->bytes += static_cast<int64_t>(places * 2 + bytes) + rows * 2 + rows / block_rows * 8;
  return delta;
}

DeltaPointer pack_low_rank(int64_t outputs, int64_t inputs, int64_t rank, const float* b, const float* a,
                           const float* bias, Storage storage) {
  const auto delta = start(Kind::low_rank, outputs, inputs, bias, storage);
  if (rank < 1) throw std::invalid_argument("deltas: expected a rank of at least 1, got " + std::to_string(rank));
  delta->rank = rank;
  delta->entries = rank * (outputs + inputs);
  delta->bytes +=
      fill_panels(delta->down, rank, inputs, a, storage) + fill_panels(delta->up, outputs, rank, b, storage);
  return delta;
}

DeltaPointer pack_dense(int64_t outputs, int64_t inputs, const float* w, const float* bias, Storage storage) {
  const auto delta = start(Kind::dense, outputs, inputs, bias, storage);
  delta->entries = outputs * inputs;
  delta->bytes += fill_panels(delta->up, outputs, inputs, w, storage);
  return delta;
}

}  // namespace pycodesign::sharing

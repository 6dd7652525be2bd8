#include "repetition/pairs.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace pycodesign::repetition {
namespace {

uint64_t draw(uint64_t& state) {  // SplitMix64
  uint64_t z = state += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

}  // namespace

PairElimination::PairElimination(std::vector<std::vector<int32_t>> rows, int32_t inputs, uint64_t seed)
    : rows_(std::move(rows)),
      inputs_(inputs),
      random_(seed),
      words_((rows_.size() + 63) / 64),
      members_(2 * words_ * static_cast<size_t>(inputs)),
      queue_(rows_.size() + 1),
      bound_(rows_.size()),
      shared_(2 * static_cast<size_t>(inputs)) {
  for (size_t r = 0; r < rows_.size(); ++r)
    for (int32_t t : rows_[r]) rows_of(t)[r / 64] |= uint64_t{1} << (r % 64);
  for (int32_t u = 0; u < inputs; ++u)
    for (int32_t v = u + 1; v < inputs; ++v)
      for (bool differ : {false, true}) push({u, v, differ}, count_rows({u, v, differ}));
}

bool PairElimination::run(size_t limit) {
  Pair pair;
  for (; limit > 0; --limit) {
    if (!pop(pair)) return false;
    replace(pair);
  }
  return true;
}

size_t PairElimination::additions() const {
  size_t total = pairs_.size();
  for (const auto& row : rows_) total += std::max<size_t>(row.size(), 1) - 1;
  return total;
}

/// Takes the most frequent pair out of the queue; false if none stands in two rows.
bool PairElimination::pop(Pair& pair) {
  while (bound_ >= 2) {
    std::vector<Pair>& ties = queue_[bound_];
    if (ties.empty()) {
      --bound_;
      continue;
    }
    if (random_) std::swap(ties[draw(random_) % ties.size()], ties.back());
    pair = ties.back();
    ties.pop_back();
    const size_t count = count_rows(pair);
    if (count == bound_) return true;
    push(pair, count);
  }
  return false;
}

void PairElimination::push(const Pair& pair, size_t count) {
  if (count >= 2) queue_[count].push_back(pair);
}

/// Puts a new variable in place of the pair, or its negative in place of the negative pair, in every row that holds it.
void PairElimination::replace(const Pair& pair) {
  const int32_t newest = inputs_ + static_cast<int32_t>(pairs_.size());
  pairs_.push_back(pair);
  members_.resize(members_.size() + 2 * words_);
  shared_.resize(shared_.size() + 2);
  for (int32_t sign : {0, 1}) {
    uint64_t* of_u = rows_of(2 * pair.u + sign);
    uint64_t* of_v = rows_of(2 * pair.v + (sign ^ pair.differ));
    uint64_t* of_newest = rows_of(2 * newest + sign);
    for (size_t w = 0; w < words_; ++w) {
      const uint64_t both = of_newest[w] = of_u[w] & of_v[w];
      of_u[w] ^= both;
      of_v[w] ^= both;
      for (uint64_t rest = both; rest; rest &= rest - 1) {
        std::vector<int32_t>& row = rows_[64 * w + static_cast<size_t>(std::countr_zero(rest))];
        std::erase_if(row, [&](int32_t t) { return t >> 1 == pair.u || t >> 1 == pair.v; });
        for (int32_t t : row)
          if (shared_[t ^ sign]++ == 0) seen_.push_back(t ^ sign);
        row.push_back(2 * newest + sign);
      }
    }
  }
  for (int32_t t : seen_) {
    push({t >> 1, newest, (t & 1) != 0}, static_cast<size_t>(shared_[t]));
    shared_[t] = 0;
  }
  seen_.clear();
}

/// The number of rows that hold both variables with the pair's signs, or with the opposite ones.
size_t PairElimination::count_rows(const Pair& pair) {
  const uint64_t* u = rows_of(2 * pair.u);
  const uint64_t* v = rows_of(2 * pair.v);
  const uint64_t* same = pair.differ ? v + words_ : v;
  const uint64_t* opposite = pair.differ ? v : v + words_;
  size_t total = 0;
  for (size_t w = 0; w < words_; ++w)
    total += static_cast<size_t>(std::popcount((u[w] & same[w]) | (u[words_ + w] & opposite[w])));
  return total;
}

}  // namespace pycodesign::repetition

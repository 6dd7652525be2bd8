#include "repetition/pairs.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace pycodesign::repetition {
namespace {

constexpr int kCandidates = 8;

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

/// Takes one of the most frequent pairs out of the queue; false if none stands in two rows.
bool PairElimination::pop(Pair& pair) {
  while (bound_ >= 2) {
    std::vector<Pair>& ties = queue_[bound_];
    uint64_t best = 0;
    size_t at = 0;
    // Candidates that have become rarer leave, and another one is drawn.
    for (int drawn = 0; !ties.empty() && drawn < (random_ ? kCandidates : 1);) {
      const size_t candidate = random_ ? draw(random_) % ties.size() : ties.size() - 1;
      const size_t count = count_rows(ties[candidate]);
      if (count < bound_) {
        push(ties[candidate], count);
        ties[candidate] = ties.back();
        ties.pop_back();
        drawn = 0;
        continue;
      }
      const uint64_t weight = random_ ? weigh(ties[candidate]) : 0;
      if (drawn++ == 0 || weight > best) {
        best = weight;
        at = candidate;
      }
    }
    if (ties.empty()) {
      --bound_;
      continue;
    }
    pair = ties[at];
    ties[at] = ties.back();
    ties.pop_back();
    return true;
  }
  return false;
}

void PairElimination::push(const Pair& pair, size_t count) {
  if (count >= 2) queue_[count].push_back(pair);
}

/// Counts the rows in which each other variable stands with the pair, by relative sign.
void PairElimination::count_neighbors(const Pair& pair) {
  seen_.clear();
  for (int32_t sign : {0, 1}) {
    const uint64_t* of_u = rows_of(2 * pair.u + sign);
    const uint64_t* of_v = rows_of(2 * pair.v + (sign ^ pair.differ));
    for (size_t w = 0; w < words_; ++w)
      for (uint64_t both = of_u[w] & of_v[w]; both; both &= both - 1)
        for (int32_t t : rows_[64 * w + static_cast<size_t>(std::countr_zero(both))])
          if (t >> 1 != pair.u && t >> 1 != pair.v && shared_[t ^ sign]++ == 0) seen_.push_back(t ^ sign);
  }
}

/// How much the variable that stands for the pair would recur together with others; frequent company counts most.
uint64_t PairElimination::weigh(const Pair& pair) {
  count_neighbors(pair);
  uint64_t total = 0;
  for (int32_t t : seen_) {
    const uint64_t repeats = std::exchange(shared_[t], 0) - 1;
    total += repeats * repeats * repeats;
  }
  return total;
}

/// Puts a new variable in place of the pair, or its negative in place of the negative pair, in every row that holds it.
void PairElimination::replace(const Pair& pair) {
  const int32_t newest = inputs_ + static_cast<int32_t>(pairs_.size());
  count_neighbors(pair);
  for (int32_t t : seen_) push({t >> 1, newest, (t & 1) != 0}, std::exchange(shared_[t], 0));
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
        row.push_back(2 * newest + sign);
      }
    }
  }
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

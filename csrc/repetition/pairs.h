#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pycodesign::repetition {

/// A variable that stands for u + v, or for u - v.
struct Pair {
  int32_t u = 0, v = 0;
  bool differ = false;
};

/// Rewrites rows of terms into shorter rows with equal sums. A term is a signed variable: 2 * variable, plus 1 if it is
/// subtracted; no row may hold a variable twice. Variables 0 to inputs - 1 are given, variable inputs + k is pair k.
///
/// As long as some signed pair of variables stands in two rows or more, the most frequent one becomes a new variable.
/// Among equally frequent pairs seed 0 takes the one that was found last: fast. With any other seed a few are drawn,
/// and the one is taken whose variable would recur most with others: slower by five times or more, about 1 % fewer
/// additions.
class PairElimination {
 public:
  PairElimination() = default;
  PairElimination(std::vector<std::vector<int32_t>> rows, int32_t inputs, uint64_t seed);

  /// Makes up to `limit` new variables; false if no pair is left that stands in two rows.
  bool run(size_t limit);

  const std::vector<std::vector<int32_t>>& rows() const { return rows_; }
  const std::vector<Pair>& pairs() const { return pairs_; }

  /// One for each pair, and one less than its terms for each row.
  size_t additions() const;

 private:
  bool pop(Pair& pair);
  void push(const Pair& pair, size_t count);
  void count_neighbors(const Pair& pair);
  uint64_t weigh(const Pair& pair);
  void replace(const Pair& pair);
  size_t count_rows(const Pair& pair);
  uint64_t* rows_of(int32_t term) { return members_.data() + words_ * static_cast<size_t>(term); }

  std::vector<std::vector<int32_t>> rows_;
  std::vector<Pair> pairs_;
  int32_t inputs_ = 0;
  uint64_t random_ = 0;  // state of the generator; 0: none

  size_t words_ = 0;
  std::vector<uint64_t> members_;  // [term][words_]: the rows that hold the term, as bits

  // Pairs by the number of rows that hold them. That number can only fall, as new variables take rows from old ones. So
  // the number under which a pair was queued is an upper bound, and it is counted again when its turn comes.
  std::vector<std::vector<Pair>> queue_;
  size_t bound_ = 0;

  std::vector<uint32_t> shared_;  // [2 * variable + differ]: rows that hold it with a pair; 0 between calls
  std::vector<int32_t> seen_;     // where it was not 0
};

}  // namespace pycodesign::repetition

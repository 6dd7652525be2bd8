// Decisions shared by packing and running; internal to this family.
#pragma once

#include <vector>

#include "repetition/repetition.h"

namespace pycodesign::repetition {

inline constexpr int max_table_entries = 128;    // seven bits of a stream byte

struct TableChoice {
  int size = 0;        // channels per table; 0: no table fits
  int block = 0;       // tables alive at a time
  double cost = 0;     // cycles per vector of pixels
};
TableChoice choose_table(const std::vector<float>& levels, const Geometry&, int64_t group_outputs);

// Cycles for one tile of one block: `entries` of `width` vectors built, then `slots` of them added for each output.
double tile_cost(double vectors, double width, double entries, double block, double outputs, double slots, double vector_bytes);

// Taps of one phase whose vectors overlap within a tile: their tables are one run of vectors.
struct TapSegment {
  int phase;
  int64_t offset;                                // vectors, of the first tap
  struct Member { int tap; int64_t shift; };
  std::vector<Member> taps;                      // ascending shift
  int64_t last() const { return offset + taps.back().shift; }
};

// The dimension-lifted layout of one input size: the padded image, flattened, cut into `lanes` segments; vector j holds the positions
// j + l * segment. A tap is then a whole number of vectors, and so is every aligned load.
struct LiftPlan {
  LiftPlan(const Geometry&, int64_t images, int64_t height, int64_t width, int lanes);
  std::vector<TapSegment> tap_segments(int vectors_per_tile) const;

  struct Phase { PhaseAxis rows, columns; };     // of the padded input modulo the stride
  struct Tap { int phase; int64_t offset; };     // offset in vectors
  int64_t images, out_rows, out_columns;
  int64_t row_pitch, image_pitch;                // positions
  int64_t segment;                               // vectors of outputs
  int64_t vectors, plane_vectors;                // vectors staged per unit and phase; and allocated
  std::vector<Phase> phases;
  std::vector<Tap> taps;
};

}  // namespace pycodesign::repetition

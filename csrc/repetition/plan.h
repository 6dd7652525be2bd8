// Decisions shared by packing and running; internal to this family.
#pragma once

#include <vector>

#include "repetition/repetition.h"

namespace pycodesign::repetition {

inline int64_t block_count(int64_t outputs) {
  return (outputs + dense_outputs - 1) / dense_outputs;
}  // of a dense group

inline constexpr int max_table_entries = 128;  // seven bits of a stream byte

struct TableChoice {
  int size = 0;     // channels per table; 0: no table fits
  int block = 0;    // tables alive at a time
  double cost = 0;  // cycles per vector of pixels
};
TableChoice choose_table(const std::vector<float>& levels, const Geometry&, int64_t group_outputs);

// Cycles for one tile of one block: `entries` of `width` vectors built, then `slots` of them added for each output.
double tile_cost(double vectors, double width, double entries, double block, double outputs, double slots,
                 double vector_bytes);

// Taps of one phase whose vectors overlap within a tile: their tables are one run of vectors.
struct TapSegment {
  int phase;
  int64_t offset;  // vectors, of the first tap
  struct Member {
    int tap;
    int64_t shift;
  };
  std::vector<Member> taps;  // ascending shift
  int64_t last() const { return offset + taps.back().shift; }
};

struct LiftPlan;

// How a layer's tables are cut into chunks of work, and where their vectors lie.
struct TablePlan {
  struct Layer {
    int entries, block;
    int64_t groups, group_outputs;
  };
  TablePlan() = default;
  TablePlan(const LiftPlan&, const Layer&, const Kernels&, int threads);

  int vectors = 0;                      // of the widest tile
  int64_t tiles = 0, splits = 0;        // of the segment, of the outputs of a group
  int64_t width = 0;                    // vectors of an entry: all segments side by side
  std::vector<int64_t> segment_source;  // bytes, as in TableBuild
  std::vector<int64_t> segment_at;
  std::vector<int> segment_shift;
  std::vector<int64_t> slot_offset;  // bytes, as in TableSum
};

// The dimension-lifted layout of one input size: the padded image, flattened, cut into `lanes` segments; vector j holds
// the positions j + l * segment. A tap is then a whole number of vectors. Planes keep only the spans of vectors that
// taps read.
struct LiftPlan {
  LiftPlan(const Geometry&, int64_t images, int64_t height, int64_t width, int lanes);
  std::vector<int> ascending_taps() const;  // by phase, then offset
  std::vector<TapSegment> tap_segments(int vectors_per_tile) const;

  struct Phase {  // the padded input modulo the stride
    PhaseAxis rows, columns;
    std::vector<Span> spans;  // the vectors that taps read
  };
  struct Tap {
    int phase;
    int64_t offset;
  };  // offset in vectors of the plane
  int64_t images, out_rows, out_columns;
  int64_t row_pitch, image_pitch;  // positions
  int64_t segment;                 // vectors of outputs
  int64_t positions;               // of the flattened image, with what tiles read behind it
  int64_t plane_vectors;           // of the longest phase
  std::vector<Phase> phases;
  std::vector<Tap> taps;
  TablePlan tables;
};

}  // namespace pycodesign::repetition

// Decisions shared by packing and running; internal to this family.
#pragma once

#include <span>
#include <vector>

#include "core/divide.h"
#include "repetition/codegen_x86.h"
#include "repetition/repetition.h"

namespace pycodesign::repetition {

using core::divide_up, core::round_up;

// Weights of so many steps stay in the first-level cache: of a block of outputs, and of a panel.
inline constexpr int64_t dense_part_steps = 256, linear_part_words = 64;
// Appends those of weights [steps][outputs] words of four bytes.
void add_runs(Runs&, const char* weights, int64_t steps, int64_t outputs, int64_t part_steps, const Activations&);

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

struct CodebookChoice {
  int block;    // tables alive at a time
  double cost;  // cycles per vector of pixels
};
CodebookChoice choose_codebook(const Codebook&, const Geometry&, int64_t outputs, const Activations&);

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

// How the words of a layer make blocks for a matrix unit.
struct MatrixShape {
  MatrixShape(const Geometry&, const Activations&);
  bool gathered;  // words of all channels and taps in one row; else steps of 16 units at one tap
  int64_t steps;
};
// Cycles per vector of pixels; infinite where there is no such unit, or weights are not exact in its words.
double matrix_cycles(const Weights&, const Geometry&, const Activations&);

// Whether `dense` runs by rows: most lanes have an output, and there are enough words of channels that turning sums
// does not count.
bool serves_rows(const Weights&, const Geometry&, const Activations&);
double row_share(int64_t outputs);  // of the time of lanes of pixels, some of which are none

// Machine code sums x - center, at most `range` in magnitude, padding included.
int32_t code_center(const Activations&);
CodeLayer code_layer(const Weights&, const Geometry&, const Activations&);

struct LiftPlan;

// The pixels of one band in rows of channels: [phase of the stride][flat position][channel].
struct RowPlan {
  RowPlan() = default;
  RowPlan(const LiftPlan&, const Geometry&, int64_t units, int64_t words);  // of a pixel; of weights

  int64_t positions = 0, row_bytes = 0;  // of a phase; of a pixel
  std::vector<int32_t> pixels;           // positions of outputs
  std::vector<int64_t> source;           // bytes from an output's row in the first phase to each word of its inputs
};

// How the tables of a layer are laid out over the tiles of one band.
struct TablePlan {
  TablePlan() = default;
  TablePlan(const LiftPlan&, int entries, int block, int64_t outputs, const Kernels&);
  // `columns` of the filter, where tables are made of their sums.
  static TablePlan of_codebook(const LiftPlan&, std::vector<ColumnTap> columns, int entries, int block, int64_t outputs,
                               const Kernels&);

  int vectors = 0;                      // of the widest tile
  int64_t tiles = 0;                    // of the segment
  int64_t width = 0;                    // vectors of an entry: all segments side by side
  std::vector<int64_t> segment_source;  // bytes, as in TableBuild
  std::vector<int64_t> segment_at;
  std::vector<int> segment_shift;
  std::vector<int64_t> slot_offset;  // bytes, as in TableSum
  std::vector<ColumnTap> columns;    // codebook
  int64_t column_vectors = 0;        // of the sums of each column that occurs
};

// One call: what to compute, and with what.
struct PackedConv2d::Call {
  const Kernels& k;
  const LayerCode* code;
  const Tensor &x, &out;
  const Tensor* residual;
  const Epilogue& epilogue;

  int64_t vector_bytes() const { return k.lanes * 4; }
};

// Sums of neighbouring outputs over one band; strides in bytes.
struct PackedConv2d::Sums {
  const char* data;
  int64_t output_stride, vector_stride;
  int64_t first_output, outputs;
};

// Scratch that outlives a call, one set per calling thread and slot.
char* scratch(int which, size_t bytes);

// Output pixels that are staged, summed and finished together: whole images, or some rows of one.
struct Band {
  int64_t image, images, row, rows;
};

// Positions from the outputs of one row, and of one image, to those of the next.
struct Pitch {
  int64_t row = 0, image = 0;
};

// The dimension-lifted layout of one band: its padded input, flattened, cut into segments, one for each lane; vector j
// holds the positions j + l * segment. A tap is then a whole number of vectors. Planes keep only the spans of vectors
// that taps read. Words of 16-bit pairs hold two lanes: l in their low halves, l + word lanes in their high halves.
struct LiftPlan {
  // With `column_planes` sums of every filter column, units are staged one after another and then summed up. The taps
  // of a row keep their distances there, and where one `adds_columns` itself.
  LiftPlan(const Geometry&, int64_t height, int64_t width, const Band&, const Pitch&, int word_lanes, int halves,
           int64_t column_planes = 0, bool adds_columns = false);
  void plan_restaging(const std::vector<LiftPlan>& bands);  // of inputs in the lanes of the same bands
  int64_t row_band_bytes() const { return static_cast<int64_t>(phases.size()) * rows.positions * rows.row_bytes; }
  size_t flat_bytes() const { return static_cast<size_t>((positions + half) * 4); }  // to stage or unlift a plane
  int64_t summed_bytes() const { return column_bytes ? column_bytes : unit_bytes; }  // of what is summed, of a unit
  void plan_columns(const Geometry&, int64_t planes, int64_t vector_bytes);
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
  Band band;
  int64_t columns;                 // of outputs
  int64_t row_pitch, image_pitch;  // positions
  int64_t segment;                 // vectors of outputs
  int64_t half;                    // positions from the low halves to the high halves; 0: words are not halved
  int64_t positions;               // words of the flattened band, with what tiles read behind it
  int64_t plane_bytes;             // of the longest phase
  int64_t unit_bytes;              // from the planes of one unit to those of the next
  std::vector<Phase> phases;
  std::vector<Tap> taps;
  std::vector<int64_t> tap_source;  // bytes from the unit's first plane
  TablePlan tables;
  RowPlan rows;

  struct ColumnPhase {                                // sums of columns of one phase of the stride: [vector][plane]
    std::array<int64_t, max_column_rows> row_source;  // bytes from the unit's first plane to the rows of the first
    int64_t vectors;
  };
  std::vector<ColumnPhase> column_phases;
  std::vector<int64_t> column_source;  // bytes from the unit's first sum to those of each phase
  int64_t column_bytes = 0;            // from the sums of one unit to those of the next

  // Of one image and so few lanes that bytes count them: where each pixel lies in them, and each lane's pixel.
  std::vector<uint8_t> pixel_lanes, lane_pixels;

  // Lifted activations: [band][channel][vector][lane], so many vectors of one channel lie in the bands before.
  int64_t lanes;
  int64_t vectors_before = 0;
  std::vector<int64_t> restage_first;  // as in Restage
  core::AlignedBuffer<uint32_t> restage_mask;
  std::vector<Halo> halos;
};

// A layer at one input size, and what it costs.
struct ConvCase {
  const Kernels& kernels;
  const Geometry& geometry;
  int64_t images, height, width;
  int word_lanes, halves;
  double cycles;            // sums of one vector, all outputs
  double weight_bytes;      // read for each band
  int64_t planes;           // staged
  int64_t outputs, blocks;  // blocks of outputs: what threads can share
  int64_t segments;         // of the weights: each sees its planes once, of all blocks
  int64_t kept;             // outputs whose sums are all kept at a time, if they are many
  int64_t column_planes;    // of every unit, for `codegen` that reads sums of columns
  bool adds_columns;        // a `codebook` that does so tile by tile
  bool by_rows;             // `dense` whose input does not lie in lanes
  bool lifted_input = false, lifted_output = false;

  bool takes_lifted() const;  // input and output can share bands
  Pitch least_pitch() const;  // of its bands
};

// Bands of images, or of the rows of each image.
struct Cut {
  int64_t image_bands = 1, row_bands = 1;
};
// The cheapest for layers of one output size, and for each into how many parts its outputs are split.
Cut choose_cut(const std::vector<ConvCase>&, const Pitch&, int threads, std::vector<int64_t>& splits);

// Bytes from a staged plane of unit 0 to every tap of every `together`-th unit: [unit][tap]. Until this thread's next
// call.
std::span<const int64_t> list_sources(const LiftPlan&, int64_t units, int64_t together);

// One input size on so many threads. Bands fit the second-level cache and are staged by whoever sums them; where there
// are too few of them for the threads, these share the outputs of each band, and stage it together before, or, from
// lanes, each for itself.
struct ConvPlan {
  ConvPlan(const ConvCase&, const Pitch&, const Cut&, int64_t splits);
  const Kernels& kernels;  // those in force when the call began
  std::vector<LiftPlan> bands;
  int64_t splits;  // of each band's outputs
};

}  // namespace pycodesign::repetition

// What the CUDA kernels of this family take. README.md beside this file says how they work, section "On a GPU".
//
// A chunk is 16 bytes: 16 inputs as bytes, or 8 as 16-bit floats. A stage is 4 chunks of the inputs of a pixel; the
// kernels sum stage by stage. A tile is 32 outputs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "repetition/kernels.h"

namespace pycodesign::repetition::cuda {

inline constexpr int chunk_bytes = 16, stage_chunks = 4, tile_outputs = 32;
inline constexpr int planes_f32 = 3;  // bfloat16 numbers whose sum a float32 is
inline constexpr int most_terms = 3;  // 16-bit numbers whose sum a level is
constexpr int planes_of(DType d) { return d == DType::f32 ? planes_f32 : 1; }
constexpr int depth_of(int planes) { return planes == 1 ? 4 : 3; }  // stages in shared memory

constexpr int chunk_inputs(bool integers) { return integers ? chunk_bytes : chunk_bytes / 2; }
// 32-bit words that a lane reads for a stage of a tile: codes of `bits` bits; of 8, or 16 for floats, the level itself
constexpr int lane_words(bool integers, int bits) { return (integers ? 64 : 32) * bits / 32; }

// x -> rows of chunks: integers as signed bytes x - center, float32 as three planes of bfloat16, 16-bit floats as they
// are. A part is what one group of the convolution, or one group of inputs with a scale of its own, reads of a pixel.
// Zeros fill up the parts.
struct Stage {
  const char* x;
  DType dtype;
  int64_t stride[4];  // of x (N, C, H, W), bytes
  int height, width;
  char* out;
  int64_t plane;      // chunks
  int64_t images;     // out: (images, rows, columns, parts, chunks)
  int rows, columns;  // the padded image, or with `gathers` the output's
  int parts, part_inputs, chunks;
  int padding[2];
  bool gathers;  // a pixel of `out` holds all that an output reads, in the order of the weights: c, r, s
  int kernel[2], stride_hw[2], dilation[2];
  int32_t center, pad;
  bool is_packed;  // every chunk is one of x, but for the center: aligned, 16 bytes one after another
};

// Where an output is, and what the epilogue adds to it.
struct Output {
  Epilogue epilogue;
  char* out;
  const char* residual;
  int64_t out_stride[4], residual_stride[4];  // (N, O, H, W), bytes
  const float* multiplier;                    // (segments, outputs)
  const float* bias;                          // (outputs), or null
  const int32_t* correction;                  // (segments, outputs), of integer sums
  const int32_t* total_correction;            // (outputs), of all segments
};

// Levels by code, as bytes: of integers the first 16; of floats low bytes of the 16-bit numbers, then high ones.
struct Lookup {
  uint32_t word[8];
};

struct DenseWeights {
  const uint32_t* words;  // [term][group][tile][stage][vector of a lane's words][lane]
  int bits;
  int terms;  // 16-bit numbers whose sum a level is
  int64_t term_words;
  Lookup lookup[most_terms];
};

// Outputs as products of weights and staged pixels.
struct Dense {
  DenseWeights weights;
  Output output;
  DType dtype;
  int groups, group_outputs, tiles;  // tiles of a group
  const char* staged;
  int64_t plane;  // chunks
  int pixels, image_pixels, row_pixels;
  int image_step;                        // from one image to the next, in chunks, as all steps
  int row_step, pixel_step, group_step;  // from one output's first input to the next output's
  int taps, row_taps;                    // taps, and how many of them lie in a row
  int tap_row_step, tap_step, chunks;    // chunks of a tap
  int stages, segment_stages;            // stages of all taps; of those that share a scale
  int splits;                            // parts of the stages, summed apart
  char* partial;                         // (splits, outputs, pixels) words, where there are several
};

// Few rows of x (T, I): without staging.
struct Rows {
  DenseWeights weights;
  Output output;
  DType dtype;
  const char* x;
  int64_t stride[2];  // bytes
  int rows, outputs, tiles;
  int part_inputs, part_stages, parts;  // inputs with a scale of their own
  bool is_packed;                       // inputs side by side, 4 bytes or 2 floats aligned and whole
  int32_t center;
};

// How the pixels and outputs are cut into blocks.
struct Shape {
  int warps;   // side by side along the outputs, each with a tile; 2 along the pixels
  int eights;  // of pixels, of a warp
  constexpr int pixels() const { return 16 * eights; }
  constexpr int pitch() const { return 8 * eights + 1; }  // of a warp's sums in shared memory
  // Stages of all planes, and then the sums in their place.
  constexpr std::size_t shared_bytes(int planes) const {
    const int stages = pixels() * stage_chunks * chunk_bytes * planes * depth_of(planes);
    const int sums = 4 * 2 * warps * tile_outputs * pitch();
    return static_cast<std::size_t>(stages > sums ? stages : sums);
  }
};
inline constexpr Shape shapes[] = {{4, 8}, {2, 8}, {2, 4}};
// Of 8 eights, which three planes do not with more than 4 levels, nor one with levels of 16 bits.
constexpr bool fits_registers(int planes, int bits) { return bits < (planes == 1 ? 16 : 4); }
inline constexpr int rows_warps = 8, rows_block = 8;

// Sums over patterns of inputs, one after another in the order of the weights; 32 pixels by 128 outputs a block.
struct Factored {
  Output output;
  DType dtype;
  const char* x;
  int64_t stride[4];  // of x (N, C, H, W), bytes
  int height, width;
  int32_t zero_point;
  int kernel[2], stride_hw[2], padding[2], dilation[2];
  int groups, group_outputs, blocks, inputs;  // blocks and inputs of a group
  int pixels, image_pixels, row_pixels;
  int units, pattern, entries;  // units: patterns of an output
  int at_once;                  // units whose tables are alive
  const void* digits;           // [group][unit][entry][input of the pattern] levels, float or int32
  const unsigned char* codes;   // [group][block][unit][output] entry, and 128 for its negative
};
inline constexpr int factored_outputs = 128, factored_lane_outputs = 16, factored_entries = 128;

void stage(const Stage&, void* stream);
void multiply(const Dense&, const Shape&, void* stream);
void multiply_rows(const Rows&, void* stream);
void add_patterns(const Factored&, void* stream);

// Of what runs on the current device, 10 times major and minor: of the GPU that its code, or the code that the driver
// translated, was compiled for.
int compiled_capability();

}  // namespace pycodesign::repetition::cuda

// The table of kernels that every instruction set fills: what they take, in which layout. See README.md beside this
// file.
//
// Letters: N images, C channels, H W input size, O outputs, R S filter size; L lanes, J vectors of a lifted plane.
// A "word" is 4 bytes: one float, one int32, or four consecutive 8-bit channels of one pixel.
#pragma once

#include <cstdint>

namespace pycodesign::repetition {

enum class DType : uint8_t { f32, u8, i8, i32, f16, bf16 };  // the last two: on a GPU
constexpr bool is_float(DType d) { return d == DType::f32 || d == DType::f16 || d == DType::bf16; }
constexpr int64_t element_bytes(DType d) {
  return d == DType::f32 || d == DType::i32 ? 4 : d == DType::f16 || d == DType::bf16 ? 2 : 1;
}

// How staging turns input elements into words.
enum class Staging : uint8_t {
  f32,           // float -> float
  centered_i32,  // 8-bit -> int32, minus the center
  halves_i16,  // four 8-bit channels -> a plane each of int16, minus the center: position p in the low half of word p,
               // p + half in the high half
  bytes4,      // four 8-bit channels -> one word of four uint8 (int8 inputs gain 128)
  bf16_terms,  // two float channels -> three planes of pairs of bfloat16, whose sum they are
};
inline constexpr int bf16_terms = 3;

// One axis of one phase (padded input modulo stride): `data` input elements from `first` on, behind `lead` elements of
// padding.
struct PhaseAxis {
  int64_t lead, data, first;
};

// Vectors first .. first + count - 1 of the lifted image, kept from vector `at` of its plane on.
struct Span {
  int64_t first, count, at;
};

// Stage one phase of 1 channel, 2 in bfloat16, or 4 8-bit ones: images to the spans of a lifted plane, vector j holding
// the flat positions j + l * segment of its lanes l.
struct Stage {
  const char* source[4];  // channels of the unit, at the phase's first element
  int channels;           // how many of them exist
  Staging staging;
  DType dtype;
  int32_t zero_point, center;                    // of the input: the value of its padding, and what is subtracted
  int64_t images, stride_n, stride_h, stride_w;  // bytes; stride_h and stride_w already multiplied by the convolution's
  PhaseAxis rows, columns;
  int64_t image_pitch, row_pitch;  // flat positions
  int64_t segment;
  const Span* spans;  // ascending
  int span_count;
  int64_t positions, half;  // words of flat, and of the high halves behind them
  char* flat;               // scratch; twice as many with bf16_terms
  char* lifted;
  int64_t channel_stride;  // halves_i16, bf16_terms: bytes between the planes
};

// Some elements of a row that another band holds: they lie one vector apart in both.
struct Halo {
  int64_t before, step;  // elements of one channel in the bands before that one, and in it
  int64_t source;        // element of the channel
  int64_t vector;        // of the staged plane
  int lane, count;
};

// Stage channels that lie in the lanes of the same grid, [vector][lane] elements, one after another: every staged
// vector is a run of them, with padding in the lanes that `mask` clears, and what other bands hold put in after.
struct Restage {
  const char* source[4];  // as in Stage: of this band
  int channels;
  const char* data;  // of all bands
  int64_t data_channels, first_channel;
  Staging staging;
  DType dtype;
  int32_t zero_point, center;
  int64_t vectors;
  const int64_t* first;  // the element for lane 0 of each vector; may lie before the channel, then masked
  const char* mask;      // vectors of ones and zeros
  const Halo* halos;
  int64_t halo_count;
  char* lifted;
  int64_t channel_stride;
};

// sums[vector][pattern] = sum over three rows of level * row[vector], levels -1, 0 or 1, the first that is not zero 1.
// Words, or pairs of int16 modulo 2^16.
struct ColumnSums {
  const char* row[3];      // null behind the filter's last
  const int8_t* patterns;  // [count][3]
  int64_t count, vectors;
  char* sums;
};

// entry[v] = sum over columns of plus or minus one of their sums, as above, from vector v on.
inline constexpr int max_kernel_columns = 3;
struct ColumnTerm {
  uint8_t pattern;
  bool minus;
};
struct KernelTable {
  const char* sums[max_kernel_columns];  // of each column of the filter: those of its phase, at its first vector
  int64_t step;                          // bytes from the sums of one vector to those of the next
  const ColumnTerm* terms;               // [entries][columns]
  int64_t entries;
  int columns, vectors;
  char* table;
  int64_t entry_bytes;
};

// One step of building a table: entry[plus] = entry[parent] + coefficient * row[channel], entry[minus] = entry[parent]
// - the same. Index -1: no such entry; parent -1, channel -1: zeros.
struct TableStep {
  int16_t plus, minus, parent, channel;
  union {
    float f;
    int32_t i;
  } coefficient;
};

// Tables of one block of units over one tile: tables[unit][entry][all segments, side by side], a segment being the
// vectors that neighbouring taps read.
struct TableBuild {
  const char* x;                  // staged plane of the block's first channel, at the tile's first vector
  int64_t channel_stride;         // bytes
  const int64_t* segment_source;  // bytes from x
  const int64_t* segment_at;      // bytes within an entry
  const int* segment_shift;       // a segment is `vectors` plus this many vectors wide
  int segments, vectors;
  int64_t units, group_size;  // tables, and channels of each
  int64_t entry_bytes, unit_bytes;
  const TableStep* steps;  // of every table
  int64_t step_count;
  char* rows;  // scratch, (group_size + 1) * entry_bytes
  char* tables;
};

// acc[o][v] (+)= sum over slots of sign * table entry, for `vectors` vectors of `outputs` outputs.
struct TableSum {
  const char* tables;
  const int64_t* slot_offset;  // bytes, per slot (unit of the block, tap)
  int slots;
  int64_t entry_bytes;
  const char* stream;  // [outputs][slots] bytes: 7 bits of entry, 1 of sign
  bool wide;           // or pairs of bytes: 15 bits and 1
  char* acc;
  int64_t acc_stride;  // bytes between outputs
  int64_t outputs;
  int vectors;  // 1 .. max_table_vectors
  bool first;   // overwrite acc
};

// acc[o][v] (+)= sum over steps (a unit at a tap) of weight[step][o] * x[step][v], o < outputs <= dense_outputs.
inline constexpr int dense_outputs = 8, max_narrow_vectors = 2;
struct DenseTile {
  const char* x;          // staged plane of the group's first unit, at the tile's first vector
  const int64_t* source;  // bytes from x, of each step
  int64_t steps;
  const char* weights;  // [steps][dense_outputs] words
  char* acc;
  int64_t acc_stride;    // bytes between outputs
  int outputs, vectors;  // vectors <= max_dense_vectors, max_narrow_vectors
  bool first;            // overwrite acc
  bool prefetched;       // weights behind these were asked for by the tile before
  // dense_narrow: lengths, which add up to `steps`, of runs whose products, two of a word's four added up, are summed
  // in 16 bits.
  const uint16_t* runs;
};

// Weights for a matrix unit: blocks of 16 outputs by 16 words (four int8, or two bfloat16), a row of 64 bytes for each
// output.
inline constexpr int64_t block_outputs = 16, block_words = 16, block_bytes = 1024;

// Weights as codes: rows of 64 bytes, each holding those of 8 / bits rows of 64 weights from the lowest bits on. A row
// of bfloat16 codes is two rows of a block, eight of the first, eight of the second, and so on.
struct BlockCodes {
  const char* codes;     // of the first block
  int bits;              // 1, 2 or 4; 0: weights are whole
  const char* levels;    // of the first output: 16 bytes by code; bfloat16: low bytes, then high ones
  int64_t level_stride;  // bytes from those of one output to those of the next
};

// acc[o][v] = sum over the words of `steps` blocks of weights * x[word][v], all outputs rounded up to whole blocks.
struct MatrixSum {
  const char* x;          // staged plane of the group's first unit
  const int64_t* source;  // bytes from x: of the first word of each step, or, gathered, of each word
  int64_t rows;           // of `source`
  bool gathered;          // words lie anywhere; behind the last are zeros
  int64_t row_stride;     // bytes between the words of a step
  int64_t term_stride;    // bfloat16: bytes between the planes of terms
  int64_t steps;
  BlockCodes codes;     // [blocks of outputs][steps]
  const char* weights;  // the same blocks whole, or
  char* expanded;       // where codes become so, room for a block of outputs, gathered: for all
  char* words;          // scratch, gathered: [steps][terms][2] blocks
  char* acc;
  int64_t acc_stride;  // bytes between outputs
  int64_t outputs, vectors;
};

// Linear layers: lanes are outputs, a panel is 64 of them.
inline constexpr int panel_outputs = 64, word_triples = 5;
struct LinearTile {
  const char* x;              // rows of words
  int64_t x_stride;           // bytes between rows
  int rows;                   // any
  const char* weights;        // dense: [words of K][64] words; packed: [words of codes][64]
  int64_t words;              // of weights per output
  const float* table;         // packed float32: [rows][codes of all words][32] sums, of triples [16]
  int64_t table_stride;       // floats between rows
  int code_bits;              // packed: bits of one code; in float32 none crosses the halves of a word
  const int8_t* level_bytes;  // packed integers: [codes in four bits][16] levels by those bits
  char* acc;                  // [rows][64]
  int64_t acc_stride;         // bytes
  bool first;                 // overwrite acc; packed: always
  const uint16_t* runs;       // linear_narrow: as in DenseTile
  // linear_f32, linear_i8, for pixels of a convolution: which rows of x are meant, or null, and which of acc, or null
  // for one after another; where each word lies behind the row's first, in bytes, how many outputs of the panel there
  // are, and the weights that come next.
  const int32_t* position;
  const int32_t* acc_position;
  const int64_t* source;
  int outputs;
  const char* next;
  int64_t next_bytes;
};

// The words of `dense` from those of `packed`, integers.
struct CodeExpansion {
  const char* codes;  // [words][64] words
  int64_t words;
  int code_bits;
  const int8_t* level_bytes;  // as in LinearTile
  char* to;                   // [words][8 / code_bits][64] words
};

// Build the tables of the packed float kernels: table[code position][e] = sum_i x[position * inputs + i] * digit[i][e].
struct LookupBuild {
  const float* x;
  int64_t positions;
  int inputs;          // per code
  int entries;         // 32, or, of triples, 16
  const float* digit;  // [inputs][entries] level of input i in entry e
  float* table;
};

// to[column][row] = from[row][column], words; strides in bytes. Vectors are read and written whole.
struct Turn {
  const char* from;
  int64_t from_stride, rows, columns;
  char* to;
  int64_t to_stride;
};

// The epilogue, in one order, every step rounded to float32.
struct Epilogue {
  DType acc_dtype = DType::f32, out_dtype = DType::f32, residual_dtype = DType::f32;
  float residual_scale = 1, residual_zero_point = 0;
  bool has_residual = false, has_lo = false, has_hi = false;
  float lo = 0, hi = 0;
  float out_scale = 1;
  int32_t out_zero_point = 0;
};
struct Finish {
  const Epilogue* epilogue;
  const char* acc;  // count words: runs of `run` of them, run_stride bytes apart; 0, or per_element: one run
  int64_t count, run, run_stride;
  bool per_element;  // multiplier, bias, correction have `count` values for all outputs (else one for each)
  const float* multiplier;
  const float* bias;          // or null
  const int32_t* correction;  // added to integer acc first
  const char* residual;
  int64_t residual_stride;  // bytes
  char* out;
  int64_t out_stride;                                                  // bytes
  int64_t outputs = 1, acc_step = 0, residual_step = 0, out_step = 0;  // bytes from one to the next

  void next_output() {
    acc += acc_step, residual += residual ? residual_step : 0, out += out_step;
    if (per_element) return;
    ++multiplier, bias += bias != nullptr, correction += correction != nullptr;
  }
};

// Lifted plane -> `rows` rows of `columns` words, one after another.
struct Unlift {
  const char* lifted;
  int64_t vector_stride;  // bytes; with halves the lanes of the high halves are the vector behind each
  int64_t segment;
  int halves;
  char* flat;  // scratch, halves * lanes * (segment + 1) words
  int64_t images, rows, columns, image_pitch, row_pitch;
  char* out;
};

// Bytes in lanes, [vector][lane], of some outputs, and the same in rows.
struct ByteRows {
  char* lifted;  // room for 64 vectors more
  int lanes;     // 16, or 32 of halves
  int64_t segment;
  char* flat;  // scratch, lanes * segment bytes of each output, and 64 more
  int64_t images, rows, columns, image_pitch, row_pitch;
  char* data;
  int64_t stride_n, stride_h;  // bytes
  int64_t outputs, lifted_step, data_step;
};

// to[i] = from[index[i]], i < count, for each of some outputs.
struct Order {
  const char* from;
  int64_t from_count;  // at most 256 bytes or 64 words
  int64_t from_step;   // bytes from one output to the next
  const uint8_t* index;
  int64_t count;
  char* to;
  int64_t to_step;
  int64_t outputs;
};

// The largest elements of windows of one map; NaN wins.
struct MaxPool {
  struct Axis {
    int64_t size, window, stride, dilation, padding, count;  // of the map; of a window; how many there are
  };
  DType dtype;
  const char* map;
  Axis rows, columns;
  char* scratch;  // scratch_elements
  char* out;

  int64_t together() const { return rows.count < 8 ? rows.count : 8; }  // rows of windows
  // The largest of a row's windows, and those of the columns of some rows, a vector behind each.
  int64_t row_elements() const { return columns.size + 2 * columns.padding + 64; }
  int64_t scratch_elements() const { return (1 + together()) * row_elements(); }
};

// The same of pixels whose channels lie side by side, in rows of whole cache lines: one row of windows.
struct MaxPoolPixels {
  DType dtype;
  const char* image;
  int64_t stride_h, stride_w;  // bytes
  MaxPool::Axis rows, columns;
  int64_t row, channel_bytes;  // of whole lines
  char* out;
  int64_t out_stride;  // bytes, of a pixel
};

struct Kernels {
  int lanes;
  bool has_matrix_unit;
  bool generates_code;  // for algorithm `codegen`: 16 registers of 32 bytes, or 32 of 64
  int max_table_vectors, max_dense_vectors;
  void (*stage)(const Stage&);
  void (*restage)(const Restage&);
  void (*unlift)(const Unlift&);
  void (*turn)(const Turn&);
  void (*lift_bytes)(const ByteRows&);    // or null, as the next
  void (*unlift_bytes)(const ByteRows&);  // so that epilogues run in lanes and transpose a quarter
  void (*order_bytes)(const Order&);      // or null, as the next
  void (*order_words)(const Order&);
  void (*finish)(const Finish&);
  void (*max_pool)(const MaxPool&);
  void (*max_pool_pixels)(const MaxPoolPixels&);
  void (*sum_columns_f32)(const ColumnSums&);
  void (*sum_columns_i16)(const ColumnSums&);
  void (*sum_columns_i32)(const ColumnSums&);
  void (*add_columns_f32)(const KernelTable&);
  void (*add_columns_i32)(const KernelTable&);
  void (*build_tables_f32)(const TableBuild&);
  void (*build_tables_i32)(const TableBuild&);
  void (*sum_tables_f32)(const TableSum&);
  void (*sum_tables_i32)(const TableSum&);
  void (*dense_f32)(const DenseTile&);
  void (*dense_i8)(const DenseTile&);
  void (*dense_narrow)(const DenseTile&);  // or null, where dense_i8 takes one instruction
  void (*dense_i32)(const DenseTile&);
  void (*multiply_i8)(const MatrixSum&);
  void (*multiply_bf16)(const MatrixSum&);
  void (*linear_f32)(const LinearTile&);
  void (*linear_i8)(const LinearTile&);
  void (*linear_narrow)(const LinearTile&);     // or null, as dense_narrow
  void (*linear_matrix_i8)(const LinearTile&);  // or null; x and acc have rows for whole blocks
  void (*expand_codes)(const CodeExpansion&);
  void (*build_lookup)(const LookupBuild&);
  void (*linear_packed_f32)(const LinearTile&);
  // Words of five codes, each of which looks up two sums of three inputs by 3 bits: where 32 floats are no cheap
  // lookup.
  void (*linear_triples_f32)(const LinearTile&);
  void (*linear_packed_i8)(const LinearTile&);
};

// Each level overwrites what it improves; scalar fills everything.
void fill_scalar(Kernels&);
void fill_avx2(Kernels&);
void fill_avx2_vnni(Kernels&);
void fill_avx512(Kernels&);
void fill_avx512_vbmi(Kernels&);
void fill_avx512_amx(Kernels&);

const Kernels& kernels();  // of the active instruction set

}  // namespace pycodesign::repetition

// Sums of convolutions: tables and dense products. A part of loops.h.
#pragma once

namespace pycodesign::repetition {
namespace {

template <class Math> void build_tables(const TableBuild& b) {
  const int64_t entry_bytes = b.entry_bytes;
  char* const zero = b.rows + b.group_size * entry_bytes;
  for (int64_t w = 0; w < entry_bytes; w += vector_bytes) Math::store(zero + w, typename Math::vec{});
  for (int64_t u = 0; u < b.units; ++u) {
    // The channels' vectors side by side, as in an entry.
    for (int64_t c = 0; c < b.group_size; ++c) {
      const char* x = b.x + (u * b.group_size + c) * b.channel_stride;
      for (int s = 0; s < b.segments; ++s) {
        char* to = b.rows + c * entry_bytes + b.segment_at[s];
        const int64_t bytes = (b.vectors + b.segment_shift[s]) * vector_bytes;
        for (int64_t w = 0; w < bytes; w += vector_bytes) Math::store(to + w, Math::load(x + b.segment_source[s] + w));
      }
    }
    char* const table = b.tables + u * b.unit_bytes;
    for (int64_t i = 0; i < b.step_count; ++i) {
      const TableStep step = b.steps[i];
      const auto plus = Math::splat(Math::coefficient(step)), minus = -plus;
      const char* x = step.channel < 0 ? zero : b.rows + step.channel * entry_bytes;
      const char* parent = step.parent < 0 ? zero : table + step.parent * entry_bytes;
      char *to = table + step.plus * entry_bytes, *and_to = table + step.minus * entry_bytes;
      if (step.plus < 0 || step.minus < 0) {
        const auto coefficient = step.plus < 0 ? minus : plus;
        if (step.plus < 0) to = and_to;
        for (int64_t w = 0; w < entry_bytes; w += vector_bytes)
          Math::store(to + w, Math::multiply_add(Math::load(parent + w), Math::load(x + w), coefficient));
      } else {
        for (int64_t w = 0; w < entry_bytes; w += vector_bytes) {
          const auto base = Math::load(parent + w), row = Math::load(x + w);
          Math::store(to + w, Math::multiply_add(base, row, plus));
          Math::store(and_to + w, Math::multiply_add(base, row, minus));
        }
      }
    }
  }
}

template <class Math, int columns> void add_columns_of(const KernelTable& t) {
  const ColumnTerm* term = t.terms;
  for (int64_t e = 0; e < t.entries; ++e, term += columns) {
    const char* from[columns];
    typename Math::vec sign[columns];
    int negative = 0;
    for (int s = 0; s < columns; ++s) {
      from[s] = t.sums[s] + term[s].pattern * vector_bytes;
      sign[s] = Math::template sign<uint8_t>(term[s].minus << 7);
      negative += term[s].minus;
    }
    const auto owed = Math::owed(negative);
    char* const to = t.table + e * t.entry_bytes;
    for (int64_t v = 0; v < t.vectors; ++v) {
      auto sum = owed;
      for (int s = 0; s < columns; ++s) sum = Math::add_entry(sum, Math::load(from[s] + v * t.step), sign[s]);
      Math::store(to + v * vector_bytes, sum);
    }
  }
}
template <class Math> void add_columns(const KernelTable& t) {
  t.columns == 2 ? add_columns_of<Math, 2>(t) : add_columns_of<Math, 3>(t);
}

template <class Math, int V, class Entry> void sum_tables_of(const TableSum& s) {
  using vec = typename Math::vec;
  constexpr uint32_t top = 1u << (8 * sizeof(Entry) - 1);  // the sign
  // Copies: the stores below could alias the fields.
  const char* const tables = s.tables;
  const int64_t* const slot_offset = s.slot_offset;
  const int64_t entry_bytes = s.entry_bytes, outputs = s.outputs, acc_stride = s.acc_stride;
  const int slots = s.slots;
  const bool first = s.first;
  const Entry* stream = reinterpret_cast<const Entry*>(s.stream);
  char* out = s.acc;
  for (int64_t o = 0; o < outputs; ++o, out += acc_stride) {
    prefetch<64>(reinterpret_cast<const char*>(stream));
    vec acc[V] = {};
    const auto add = [&](int slot, uint32_t code) __attribute__((always_inline)) {
      const char* entry = tables + slot_offset[slot] + (code & (top - 1)) * entry_bytes;
      const vec sign = Math::template sign<Entry>(code);
      for (int v = 0; v < V; ++v) acc[v] = Math::add_entry(acc[v], Math::load(entry + v * vector_bytes), sign);
    };
    int m = 0;
    for (; m + 9 <= slots; m += 9, stream += 9)
      for (int i = 0; i < 9; ++i) add(m + i, stream[i]);
    for (; m + 4 <= slots; m += 4, stream += 4)
      for (int i = 0; i < 4; ++i) add(m + i, stream[i]);
    for (; m < slots; ++m) add(m, *stream++);
    for (int v = 0; v < V; ++v) add_part<Math>(out + v * vector_bytes, acc[v], first);
  }
}

template <class Math, class Entry> void sum_tables_from(const TableSum& s) {
  switch (s.vectors) {
    case 1: return sum_tables_of<Math, 1, Entry>(s);
    case 2: return sum_tables_of<Math, 2, Entry>(s);
    case 3: return sum_tables_of<Math, 3, Entry>(s);
    case 4: return sum_tables_of<Math, 4, Entry>(s);
    case 5: return sum_tables_of<Math, 5, Entry>(s);
    case 6: return sum_tables_of<Math, 6, Entry>(s);
    case 7: return sum_tables_of<Math, 7, Entry>(s);
    default: return sum_tables_of<Math, 8, Entry>(s);
  }
}
template <class Math> void sum_tables(const TableSum& s) {
  s.wide ? sum_tables_from<Math, uint16_t>(s) : sum_tables_from<Math, uint8_t>(s);
}

template <class Math, int O, int V> void dense_of(const DenseTile& d) {
  using vec = typename Math::vec;
  vec acc[O][V] = {};
  const char *const x = d.x, *w = d.weights;
  const int64_t ahead = d.prefetched ? 0 : prefetch_distance;
  for (int64_t i = 0; i < d.steps; ++i, w += dense_outputs * 4) {
    __builtin_prefetch(w + ahead, 0, 2);
    vec value[V];
    for (int v = 0; v < V; ++v) value[v] = Math::load(x + d.source[i] + v * vector_bytes);
    for (int o = 0; o < O; ++o) {
      const vec weight = Math::broadcast(w + o * 4);
      for (int v = 0; v < V; ++v) acc[o][v] = Math::multiply_add(acc[o][v], value[v], weight);
    }
  }
  for (int o = 0; o < O; ++o)
    for (int v = 0; v < V; ++v) add_part<Math>(d.acc + o * d.acc_stride + v * vector_bytes, acc[o][v], d.first);
}

template <class Math, int O> void dense_vectors(const DenseTile& d) {
  switch (d.vectors) {
    case 1: return dense_of<Math, O, 1>(d);
    case 2: return dense_of<Math, O, 2>(d);
    default: return dense_of<Math, O, 3>(d);
  }
}

// Outputs in blocks that the registers hold.
template <class Math> void dense(const DenseTile& d) {
  DenseTile part = d;
  while (part.outputs > 0) {
    int done;
    if (dense_block >= 8 && part.outputs >= 8) dense_vectors<Math, dense_block>(part), done = dense_block;
    else if (part.outputs >= 4) dense_vectors<Math, 4>(part), done = 4;
    else if (part.outputs >= 2) dense_vectors<Math, 2>(part), done = 2;
    else dense_vectors<Math, 1>(part), done = 1;
    part.outputs -= done;
    part.weights += done * 4;
    part.acc += done * part.acc_stride;
  }
}

}  // namespace
}  // namespace pycodesign::repetition

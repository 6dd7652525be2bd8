// The x86-64 instructions that codegen_x86.cpp needs, as bytes. Vectors are zmm (EVEX prefixes) or ymm (VEX).
//
// Names are those of the manuals (Intel SDM volume 2, chapter 2 for the prefixes): operands in Intel order, the result
// first.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <utility>
#include <vector>

namespace pycodesign::repetition {

enum class General : uint8_t { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11 };

// base + scale * index + displacement; without an index if scale is 0. The index is one of the first eight registers,
// and rsp, rbp and their like, whose encodings mean other things, are no base.
struct Address {
  General base;
  int scale = 0;
  General index = General::rax;
  int64_t displacement = 0;
};

struct Constant {
  int64_t number;
};

class Assembler {
 public:
  struct Vector {
    int number;
  };
  // Opcode map (1: 0F, 2: 0F 38), mandatory prefix (1: 66) and opcode; every W is 0.
  struct Opcode {
    uint8_t map, prefix, byte;
  };
  static constexpr Opcode vaddps{1, 0, 0x58}, vsubps{1, 0, 0x5c}, vmulps{1, 0, 0x59}, vfmadd231ps{2, 1, 0xb8},
      vfnmadd231ps{2, 1, 0xbc}, vfmadd132ps{2, 1, 0x98}, vfnmadd132ps{2, 1, 0x9c}, vpaddw{1, 1, 0xfd},
      vpsubw{1, 1, 0xf9}, vpmullw{1, 1, 0xd5}, vpaddd{1, 1, 0xfe}, vpsubd{1, 1, 0xfa}, vpxord{1, 1, 0xef};

  explicit Assembler(bool avx512) : avx512_(avx512) {}

  int64_t size() const { return static_cast<int64_t>(bytes_.size()); }
  int64_t vector_bytes() const { return avx512_ ? 64 : 32; }

  void operate(Opcode op, Vector to, Vector a, Vector b) {
    prefixes(op, to.number, a.number, b.number & 16, b.number & 8);
    register_operand(to.number, b.number);
  }
  void operate(Opcode op, Vector to, Vector a, const Address& b) {
    prefixes(op, to.number, a.number, false, number(b.base) & 8);
    memory_operand(to.number, b, avx512_ ? 64 : 1);
  }
  void operate(Opcode op, Vector to, Vector a, Constant b) {
    prefixes(op, to.number, a.number, false, false);
    byte(0x05 | (to.number & 7) << 3);  // relative to the next instruction
    uses_.push_back({bytes_.size(), b});
    word(0);
  }
  template <class Source> void vmovups(Vector to, const Source& from) { operate(load_, to, {0}, from); }
  void vmovups(const Address& to, Vector from) { operate(store_, from, {0}, to); }
  void vpslld(Vector to, Vector a, int count) { shift(6, to, a, count); }
  void vpsrad(Vector to, Vector a, int count) { shift(4, to, a, count); }
  void vzeroupper() { append({0xc5, 0xf8, 0x77}); }

  void mov(General to, const Address& from) { general({0x8b}, true, number(to), from); }
  void lea(General to, const Address& from) { general({0x8d}, true, number(to), from); }
  void test(const Address& a) { general({0x85}, false, 0, a); }  // reads memory, changes flags
  void prefetcht1(const Address& a) { general({0x0f, 0x18}, false, 2, a); }
  void ret() { byte(0xc3); }
  void align(int64_t to) {
    while (size() % to) byte(0xcc);
  }

  // The code followed by its constants, each filling a vector with one 32-bit word.
  std::vector<uint8_t> finish(const std::vector<uint32_t>& constants) {
    align(64);
    const int64_t first = size();
    for (const uint32_t constant : constants)
      for (int64_t i = 0; i < vector_bytes(); i += 4) word(constant);
    for (const Use& use : uses_) {
      const int64_t from = static_cast<int64_t>(use.at) + 4, to = first + use.constant.number * vector_bytes();
      for (size_t i = 0; i < 4; ++i) bytes_[use.at + i] = static_cast<uint8_t>((to - from) >> 8 * i);
    }
    return std::move(bytes_);
  }

 private:
  struct Use {
    size_t at;
    Constant constant;
  };
  static constexpr Opcode load_{1, 0, 0x10}, store_{1, 0, 0x11}, shift_{1, 1, 0x72};

  static int number(General r) { return static_cast<int>(r); }
  void byte(int value) { bytes_.push_back(static_cast<uint8_t>(value)); }
  void word(uint32_t value) {
    for (int i = 0; i < 32; i += 8) byte(static_cast<int>(value >> i));
  }
  void append(std::initializer_list<int> values) {
    for (const int value : values) byte(value);
  }

  // x and b are bits 4 and 3 of a register operand; of an address, b is bit 3 of the base. The prefixes hold register
  // bits inverted.
  void prefixes(Opcode op, int reg, int second, bool x, bool b) {
    const int r = !(reg & 8) << 7, rest = (~second & 15) << 3 | 4 | op.prefix;
    if (avx512_) {
      append({0x62, r | !x << 6 | !b << 5 | !(reg & 16) << 4 | op.map, rest, 2 << 5 | !(second & 16) << 3});
    } else if (op.map == 1 && !x && !b) {
      append({0xc5, r | rest});
    } else {
      append({0xc4, r | !x << 6 | !b << 5 | op.map, rest});
    }
    byte(op.byte);
  }
  void register_operand(int reg, int rm) { byte(0xc0 | (reg & 7) << 3 | (rm & 7)); }

  // A displacement that is a small multiple of `unit` takes one byte.
  void memory_operand(int reg, const Address& a, int64_t unit) {
    const int base = number(a.base) & 7;
    const int64_t units = a.displacement / unit;
    const bool small = a.displacement % unit == 0 && units == static_cast<int8_t>(units);
    const int mod = a.displacement == 0 ? 0 : small ? 1 : 2;
    byte(mod << 6 | (reg & 7) << 3 | (a.scale ? 4 : base));
    if (a.scale) byte(a.scale / 2 << 6 | number(a.index) << 3 | base);  // scales 1, 2 and 4
    if (mod == 1) byte(static_cast<int>(units));
    else if (mod == 2) word(static_cast<uint32_t>(a.displacement));
  }

  void shift(int reg, Vector to, Vector a, int count) {
    prefixes(shift_, reg, to.number, a.number & 16, a.number & 8);
    register_operand(reg, a.number);
    byte(count);
  }
  void general(std::initializer_list<int> opcode, bool wide, int reg, const Address& a) {
    const int rex =
        0x40 | wide << 3 | (reg & 8) >> 1 | (a.scale ? number(a.index) & 8 : 0) >> 2 | (number(a.base) & 8) >> 3;
    if (rex != 0x40) byte(rex);
    append(opcode);
    memory_operand(reg, a, 1);
  }

  bool avx512_;
  std::vector<uint8_t> bytes_;
  std::vector<Use> uses_;
};

}  // namespace pycodesign::repetition

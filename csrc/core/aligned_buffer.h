// Uninitialized scratch memory that starts on a cache line and only grows.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <type_traits>

namespace pycodesign::core {

inline constexpr size_t cache_line = 64;

template <class T>
class AlignedBuffer {
  static_assert(std::is_trivially_copyable_v<T> && std::is_trivially_default_constructible_v<T>);

 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t size) { reserve(size); }

  // Room for `size` elements. Growing loses the contents.
  T* reserve(size_t size) {
    if (size > size_) {
      if (size > (static_cast<size_t>(-1) - cache_line) / sizeof(T)) throw std::bad_alloc();
      data_.reset();
      size_ = 0;
      data_.reset(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t{cache_line})));
      size_ = size;
    }
    return data_.get();
  }

  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_.get()[i]; }
  const T& operator[](size_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t{cache_line}); }
  };

  std::unique_ptr<T, Free> data_;
  size_t size_ = 0;
};

}  // namespace pycodesign::core

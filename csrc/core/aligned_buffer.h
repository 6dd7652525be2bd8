// Uninitialized scratch memory that starts on a cache line and only grows.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <memory>
#include <new>
#include <type_traits>

namespace pycodesign::core {

inline constexpr size_t cache_line = 64, huge_page = size_t{2} << 20;

template <class T> class AlignedBuffer {
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
      const size_t bytes = size * sizeof(T), alignment = bytes >= huge_page ? huge_page : cache_line;
      data_ = {static_cast<T*>(::operator new(bytes, std::align_val_t{alignment})), Free{alignment}};
#if defined(__linux__)
      // Weights read once per call miss the TLB on every small page.
      if (alignment == huge_page) ::madvise(data_.get(), bytes / huge_page * huge_page, MADV_HUGEPAGE);
#endif
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
    size_t alignment = cache_line;
    void operator()(T* data) const { ::operator delete(data, std::align_val_t{alignment}); }
  };

  std::unique_ptr<T, Free> data_;
  size_t size_ = 0;
};

}  // namespace pycodesign::core

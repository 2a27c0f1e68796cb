// Memory for intermediate results of a kernel that lives as long as the calling thread.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <memory>
#include <new>

namespace latente {

// Only grows; what was in it is lost then.
template <class T>
class Scratch {
 public:
  T* reserve(int64_t count) {
    if (size_ < count) {
      data_.reset();
      size_ = 0;
      const size_t bytes = static_cast<size_t>(count) * sizeof(T);
      data_.reset(static_cast<T*>(::operator new(bytes, alignment)));
      size_ = count;
      if (bytes >= huge_page) madvise(data_.get(), bytes, MADV_HUGEPAGE);  // a hint: may fail
    }
    return data_.get();
  }

 private:
  static constexpr size_t huge_page = 2 << 20;
  static constexpr std::align_val_t alignment{4096};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, alignment); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

}  // namespace latente

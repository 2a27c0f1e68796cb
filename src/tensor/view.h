// Shapes and views: what kernels see. A View never owns memory.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

#include "base/error.h"
#include "tensor/dtype.h"

namespace latente {

inline constexpr int max_rank = 4;

// Up to four extents. A scalar has rank 1 and one element.
class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<int64_t> extents) : Shape(std::span(extents.begin(), extents.size())) {}
  explicit Shape(std::span<const int64_t> extents);

  int rank() const { return rank_; }
  int64_t operator[](int axis) const { return extents_[static_cast<size_t>(axis < 0 ? axis + rank_ : axis)]; }
  int64_t count() const;
  // Product of the extents from axis `first` on.
  int64_t count_from(int first) const;
  bool operator==(const Shape&) const = default;
  std::string str() const;  // "[2, 3]"

 private:
  std::array<int64_t, max_rank> extents_{};
  int rank_ = 0;
};

// rows: element (i, j, ...) stands at i·stride(0) + j·stride(1) + ...
// panels: a matrix (or a stack of them) as its backend's products read it, see Backend::pack. Nothing but
// products can.
enum class Layout : uint8_t { rows, panels };

class PendingPanels;
class Residency;

struct View {
  void* data = nullptr;
  Shape shape;
  std::array<int64_t, max_rank> strides{};  // in elements
  DType dtype = DType::f32;
  Layout layout = Layout::rows;
  int32_t group = 0;  // quantised: elements of a row that share a scale
  // Of a stack of matrices that are only in memory on demand: matrix i is piece first_piece + i. Whoever
  // reads one awaits it (base/residency.h).
  int32_t first_piece = 0;
  Residency* residency = nullptr;
  // Of panels that may not be laid out yet; `data` is then where they will be (tensor/pending_panels.h).
  const PendingPanels* pending = nullptr;

  View() = default;
  View(void* data, Shape shape, DType dtype);  // contiguous

  explicit operator bool() const { return data != nullptr; }
  int64_t operator[](int axis) const { return shape[axis]; }
  int64_t stride(int axis) const {
    return strides[static_cast<size_t>(axis < 0 ? axis + shape.rank() : axis)];
  }
  int64_t count() const { return shape.count(); }
  int64_t bytes() const { return count() * size_of(dtype); }
  bool contiguous() const;

  template <class T>
  T* as() const {
    LATENTE_ASSERT(dtype == dtype_of<T> && layout == Layout::rows && !residency);
    return static_cast<T*>(data);
  }
  template <class T>
  const T* panels_as() const {
    LATENTE_ASSERT(dtype == dtype_of<T> && layout == Layout::panels && !residency && !pending);
    return static_cast<const T*>(data);
  }
  template <class T>
  T* as_or_null() const {
    return data ? as<T>() : nullptr;
  }
};

std::array<int64_t, max_rank> contiguous_strides(const Shape& shape);
// Columns [first, last) of the last axis; of rows.
View columns_of(const View& x, int64_t first, int64_t last);

}  // namespace latente

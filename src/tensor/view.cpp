#include "tensor/view.h"

namespace latente {

Shape::Shape(std::span<const int64_t> extents) : rank_(static_cast<int>(extents.size())) {
  if (extents.empty() || extents.size() > max_rank)
    fail("a shape has 1 to {} extents, not {}", max_rank, extents.size());
  for (size_t i = 0; i < extents.size(); ++i) {
    if (extents[i] < 0) fail("a shape has no negative extents: {} on axis {}", extents[i], i);
    extents_[i] = extents[i];
  }
}

int64_t Shape::count() const { return count_from(0); }

int64_t Shape::count_from(int first) const {
  int64_t product = 1;
  for (int axis = first; axis < rank_; ++axis) product *= (*this)[axis];
  return product;
}

std::string Shape::str() const {
  return fmt::format("[{}]", fmt::join(extents_.begin(), extents_.begin() + rank_, ", "));
}

std::array<int64_t, max_rank> contiguous_strides(const Shape& shape) {
  std::array<int64_t, max_rank> strides{};
  for (int axis = 0; axis < shape.rank(); ++axis)
    strides[static_cast<size_t>(axis)] = shape.count_from(axis + 1);
  return strides;
}

View columns_of(const View& x, int64_t first, int64_t last) {
  LATENTE_ASSERT(0 <= first && first <= last && last <= x[-1] && x.layout == Layout::rows && !x.residency);
  std::array<int64_t, max_rank> extents{};
  const int rank = x.shape.rank();
  for (int i = 0; i < rank; ++i) extents[static_cast<size_t>(i)] = x[i];
  extents[static_cast<size_t>(rank - 1)] = last - first;
  View columns = x;
  columns.shape = Shape(std::span<const int64_t>(extents.data(), static_cast<size_t>(rank)));
  columns.data = static_cast<char*>(x.data) + first * size_of(x.dtype);
  return columns;
}

View::View(void* pointer, Shape extents, DType type)
    : data(pointer), shape(extents), strides(contiguous_strides(extents)), dtype(type) {}

bool View::contiguous() const {
  int64_t expected = 1;
  for (int axis = shape.rank() - 1; axis >= 0; --axis) {
    if (shape[axis] != 1 && stride(axis) != expected) return false;
    expected *= shape[axis];
  }
  return true;
}

}  // namespace latente

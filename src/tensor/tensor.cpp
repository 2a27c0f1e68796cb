#include "tensor/tensor.h"

#include <sys/mman.h>

namespace latente {

View Tensor::view() const {
  View view;
  if (!value_) return view;
  const Value& root = value_->base ? *value_->base : *value_;
  view.shape = value_->shape;
  view.strides = value_->strides;
  view.dtype = value_->dtype;
  view.layout = value_->layout;
  view.group = value_->group;
  view.first_piece = value_->first_piece;
  view.residency = value_->residency;
  view.pending = value_->pending;
  view.data = root.data ? static_cast<char*>(root.data) + value_->offset * size_of(value_->dtype) : nullptr;
  return view;
}

bool Tensor::has_storage() const {
  return value_ && (value_->base ? value_->base->data : value_->data) != nullptr;
}

Tensor Tensor::alias(Shape shape, std::array<int64_t, max_rank> strides, int64_t offset) const {
  LATENTE_ASSERT(!value_->residency && !value_->pending);
  auto value = std::make_shared<Value>();
  value->shape = shape;
  value->strides = strides;
  value->dtype = value_->dtype;
  value->layout = value_->layout;
  value->group = value_->group;
  value->name = value_->name;
  value->plan = value_->plan;
  value->requires_grad = value_->requires_grad;
  value->version = value_->version;
  value->base = value_->base ? value_->base : value_;
  value->offset = value_->offset + offset;
  return Tensor(std::move(value));
}

Tensor Tensor::reshape(Shape shape) const {
  LATENTE_ASSERT(shape.count() == count());
  View mine;
  mine.shape = value_->shape;
  mine.strides = value_->strides;
  if (mine.contiguous()) return alias(shape, contiguous_strides(shape), 0);
  LATENTE_ASSERT(mine.stride(-1) == 1 && shape[0] == mine.shape[0]);
  if (mine.shape.rank() == 3) {
    LATENTE_ASSERT(mine.shape[1] == 1 && shape.rank() == 2);
    return alias(shape, {mine.stride(0), 1}, 0);
  }
  LATENTE_ASSERT(mine.shape.rank() == 2 && shape.rank() == 3);
  return alias(shape, {mine.stride(0), shape[2], 1}, 0);
}

Tensor Tensor::slice(int axis, int64_t begin, int64_t end) const {
  LATENTE_ASSERT(0 <= begin && begin <= end && end <= value_->shape[axis]);
  std::array<int64_t, max_rank> extents{};
  for (int i = 0; i < value_->shape.rank(); ++i) extents[static_cast<size_t>(i)] = value_->shape[i];
  extents[static_cast<size_t>(axis)] = end - begin;
  Shape shape(std::span<const int64_t>(extents.data(), static_cast<size_t>(value_->shape.rank())));
  return alias(shape, value_->strides, begin * value_->strides[static_cast<size_t>(axis)]);
}

const Value* root_of(const Tensor& tensor) {
  const Value& value = tensor.value();
  return value.base ? value.base.get() : &value;
}

Tensor parameter(Shape shape, DType dtype, bool requires_grad) {
  auto value = std::make_shared<Value>();
  value->shape = shape;
  value->strides = contiguous_strides(shape);
  value->dtype = dtype;
  value->requires_grad = requires_grad;
  return Tensor(std::move(value));
}

std::shared_ptr<void> aligned_memory(int64_t bytes) {
  // Anonymous pages come zeroed and are only resident once touched.
  size_t size = static_cast<size_t>(std::max<int64_t>(bytes, 64));
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("out of memory: could not allocate {} bytes", size);
  if (size >= (size_t{4} << 20)) madvise(memory, size, MADV_HUGEPAGE);
  return {memory, [size](void* pointer) { munmap(pointer, size); }};
}

void allocate(const Tensor& tensor) {
  std::shared_ptr<void> memory = aligned_memory(tensor.count() * size_of(tensor.dtype()));
  void* data = memory.get();
  bind_memory(tensor, data, std::move(memory));
}

void bind_memory(const Tensor& tensor, void* data, std::shared_ptr<void> owner) {
  Value& value = tensor.value();
  LATENTE_ASSERT(!value.base);
  value.data = data;
  value.owner = std::move(owner);
}

void bind_view(const Tensor& tensor, const View& view, std::shared_ptr<void> owner) {
  Value& value = tensor.value();
  LATENTE_ASSERT(view.shape == value.shape);
  bind_memory(tensor, view.data, std::move(owner));
  value.strides = view.strides;
  value.dtype = view.dtype;
  value.layout = view.layout;
  value.group = view.group;
  value.first_piece = view.first_piece;
  value.residency = view.residency;
  value.pending = view.pending;
}

Tensor buffer(Shape shape, DType dtype, std::string name) {
  Tensor tensor = parameter(shape, dtype, false);
  tensor.value().name = std::move(name);
  allocate(tensor);
  return tensor;
}

}  // namespace latente

// Tensor: a handle to a value. A value is a parameter or a buffer (its memory persists), or an intermediate
// of one Plan (its memory is a piece of the plan's arena and is only valid while the plan runs).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "tensor/view.h"

namespace latente {

class Plan;
struct Fp8Tensors;

struct Value {
  Shape shape;
  std::array<int64_t, max_rank> strides{};
  DType dtype = DType::f32;
  Layout layout = Layout::rows;
  int32_t group = 0, first_piece = 0;  // see View
  Residency* residency = nullptr;
  const PendingPanels* pending = nullptr;
  std::string name;      // a parameter's checkpoint path; otherwise free text for messages
  Plan* plan = nullptr;  // the plan an intermediate or input belongs to
  bool requires_grad = false;
  void* data = nullptr;         // of a root; aliases go through `base`
  std::shared_ptr<void> owner;  // keeps persistent memory alive
  std::shared_ptr<Value> base;  // the value this one aliases; always a root, null for roots
  int64_t offset = 0;           // elements from the base's first element
  int version = 0;              // how often it was changed in place (Plan::updated)
  std::shared_ptr<Value> grad;  // parameters: the persistent gradient; replay accumulates into it
  // weights that train in FP8: their codes and scales, persistent too (PlanOptions::fp8)
  std::shared_ptr<Fp8Tensors> fp8;
};

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(std::shared_ptr<Value> value) : value_(std::move(value)) {}

  explicit operator bool() const { return value_ != nullptr; }
  const Shape& shape() const { return value_->shape; }
  int64_t operator[](int axis) const { return value_->shape[axis]; }
  int64_t count() const { return value_->shape.count(); }
  DType dtype() const { return value_->dtype; }
  const std::string& name() const { return value_->name; }
  bool requires_grad() const { return value_->requires_grad; }
  Plan* plan() const { return value_->plan; }
  Value& value() const { return *value_; }
  const std::shared_ptr<Value>& shared() const { return value_; }

  // Where the data lies now. A null handle gives a null view.
  View view() const;
  bool has_storage() const;

  // The same elements under another shape. Rows with gaps [T, D] may become [T, G, D / G], and [T, 1, D] back
  // [T, D].
  Tensor reshape(Shape shape) const;
  // [begin:end] of one axis; columns() of the last, rows() of the first.
  Tensor slice(int axis, int64_t begin, int64_t end) const;
  Tensor columns(int64_t begin, int64_t end) const { return slice(shape().rank() - 1, begin, end); }
  Tensor rows(int64_t begin, int64_t end) const { return slice(0, begin, end); }

 private:
  Tensor alias(Shape shape, std::array<int64_t, max_rank> strides, int64_t offset) const;
  std::shared_ptr<Value> value_;
};

// The value in whose memory the tensor's elements are.
const Value* root_of(const Tensor& tensor);

// A trainable parameter without storage: enough to count, plan and estimate.
Tensor parameter(Shape shape, DType dtype, bool requires_grad = true);

// Persistent host memory, zeroed, 64-byte aligned.
void allocate(const Tensor& tensor);
// Persistent memory owned by somebody else (a mapped file). Not named bind: std::bind would be the better
// match.
void bind_memory(const Tensor& tensor, void* data, std::shared_ptr<void> owner);
// The same for memory that holds the values as `view` describes them: in another layout or type
// (Backend::pack). The shape stays.
void bind_view(const Tensor& tensor, const View& view, std::shared_ptr<void> owner);
// A persistent tensor outside any plan: allocate(parameter(...)) without gradient.
Tensor buffer(Shape shape, DType dtype, std::string name = {});

// `bytes` of zeroed memory on a 64-byte boundary.
std::shared_ptr<void> aligned_memory(int64_t bytes);

}  // namespace latente

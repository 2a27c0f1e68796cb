#include <algorithm>

#include "tensor/plan.h"

namespace latente {
namespace {

const Value* root_of(const Tensor& tensor) {
  const Value& value = tensor.value();
  return value.base ? value.base.get() : &value;
}

}  // namespace

Gradients::Region Gradients::region_of(const Tensor& x) {
  const Value& value = x.value();
  int64_t whole = root_of(x)->shape.count();
  int64_t run = 1;
  for (int axis = value.shape.rank() - 1; axis >= 0; --axis) {
    int64_t stride = value.strides[static_cast<size_t>(axis)];
    if (value.shape[axis] != 1 && stride != run)
      return {stride, value.offset % stride, value.offset % stride + run};
    run *= value.shape[axis];
  }
  if (run == whole) return {};
  return {whole, value.offset, value.offset + run};
}

bool Gradients::reached(const Tensor& y) const { return entries_.contains(root_of(y)); }

// The part of a gradient buffer that corresponds to x within its root.
Tensor Gradients::region_view(const Tensor& gradient, const Tensor& x) const {
  const Value& like = x.value();
  auto value = std::make_shared<Value>();
  value->shape = like.shape;
  value->strides = like.strides;
  value->offset = like.offset;
  value->dtype = gradient.dtype();
  value->plan = gradient.plan();
  value->name = gradient.name();
  value->base = gradient.value().base ? gradient.value().base : gradient.shared();
  value->offset += gradient.value().offset;
  return Tensor(std::move(value));
}

void Gradients::zero(const Tensor& tensor) {
  plan_.record("fill", {}, {tensor}, [tensor](Backend& b) { b.fill(tensor.view(), 0.0); });
}

// Zeroes the columns nobody wrote, and marks the whole as written.
void Gradients::complete(const Value* root, Entry& entry, int64_t period) {
  int64_t count = root->shape.count();
  Tensor rows = entry.buffer.reshape({count / period, period});
  std::sort(entry.written.begin(), entry.written.end(),
            [](const Region& a, const Region& b) { return a.begin < b.begin; });
  int64_t at = 0;
  for (const Region& region : entry.written) {
    LATENTE_ASSERT(region.period == period && region.begin >= at);
    if (region.begin > at) zero(rows.columns(at, region.begin));
    at = region.end;
  }
  if (at < period) zero(rows.columns(at, period));
  entry.written = {Region{}};
}

// Before a buffer shared between several values is added to: a copy, if another value's producer still has to
// read it.
void Gradients::make_private(const Value* root, Entry& entry) {
  const Value* mine = root_of(entry.buffer);
  bool pending = false;
  for (const auto& [other, theirs] : entries_) {
    if (other == root || !theirs.buffer || root_of(theirs.buffer) != mine) continue;
    for (size_t i = 0; i < node_ && !pending; ++i) {
      for (const Tensor& tensor : plan_.nodes_[i].writes) pending = pending || root_of(tensor) == other;
    }
  }
  if (!pending) return;
  Tensor from = entry.buffer;
  Tensor to = plan_.intermediate(root->shape, root->dtype);
  plan_.record("copy", {from}, {to}, [from, to](Backend& b) { b.copy(from.view(), {to.view(), false}); });
  entry.buffer = to;
}

Tensor Gradients::of(const Tensor& y) {
  const Value* root = root_of(y);
  Entry& entry = entries_.at(root);
  LATENTE_ASSERT(entry.buffer);
  Region region = region_of(y);
  bool covered = std::any_of(entry.written.begin(), entry.written.end(),
                             [&](const Region& written) { return written.period == 0 || written == region; });
  if (!covered) complete(root, entry, entry.written.front().period);
  return region_view(entry.buffer, y);
}

Tensor Gradients::updatable(const Tensor& y) {
  const Value* root = root_of(y);
  make_private(root, entries_.at(root));
  return of(y);
}

Gradients::Slot Gradients::slot(const Tensor& x) {
  if (!x || !x.requires_grad()) return {};
  Tensor root(x.value().base ? x.value().base : x.shared());
  if (!root.plan()) {
    Value& parameter_value = root.value();
    if (!parameter_value.grad) {
      DType dtype = root.dtype() == DType::f64 ? DType::f64 : DType::f32;
      parameter_value.grad = parameter(root.shape(), dtype, false).shared();
      parameter_value.grad->name = root.name() + " (gradient)";
    }
    return {region_view(Tensor(parameter_value.grad), x), true};
  }
  Entry& entry = entries_[&root.value()];
  Region region = region_of(x);
  if (!entry.buffer) {
    entry.buffer = plan_.intermediate(root.shape(), root.dtype());
    entry.written = {region};
    return {region_view(entry.buffer, x), false};
  }
  make_private(&root.value(), entry);
  bool whole = entry.written.front().period == 0;
  bool known = std::find(entry.written.begin(), entry.written.end(), region) != entry.written.end();
  if (!whole && region.period == 0) {
    complete(&root.value(), entry, entry.written.front().period);
    whole = true;
  }
  if (whole || known) return {region_view(entry.buffer, x), true};
  for (const Region& other : entry.written) {
    LATENTE_ASSERT(other.period == region.period && (region.end <= other.begin || other.end <= region.begin));
  }
  entry.written.push_back(region);
  return {region_view(entry.buffer, x), false};
}

void Gradients::share(const Tensor& x, const Tensor& gradient) {
  if (!x.requires_grad()) return;
  Tensor root(x.value().base ? x.value().base : x.shared());
  Entry* entry = root.plan() ? &entries_[&root.value()] : nullptr;
  if (entry && !entry->buffer && region_of(x).period == 0 && region_of(gradient).period == 0) {
    entry->buffer = gradient.reshape(root.shape());
    entry->written = {Region{}};
    return;
  }
  Slot to = slot(x);
  plan_.record("copy", {gradient, to.accumulate ? to.tensor : Tensor()}, {to.tensor},
               [gradient, to](Backend& b) { b.copy(gradient.view(), to.view()); });
}

}  // namespace latente

#include <algorithm>

#include "tensor/plan.h"

namespace latente {
Gradients::Region Gradients::region_of(const Tensor& x) {
  const Value& value = x.value();
  int64_t whole = root_of(x)->shape.count();
  int64_t run = 1, period = 0, covered = 1;
  for (int axis = value.shape.rank() - 1; axis >= 0; --axis) {
    int64_t stride = value.strides[static_cast<size_t>(axis)], extent = value.shape[axis];
    if (extent == 1) continue;
    if (period == 0 && stride != run)
      period = covered = stride;  // the first gap: from here on rows are counted
    if (stride != covered) return irregular;
    covered *= extent;
    if (period == 0) run = covered;
  }
  if (period == 0) return run == whole ? Region{} : Region{whole, value.offset, value.offset + run};
  return covered == whole ? Region{period, value.offset, value.offset + run} : irregular;
}

bool Gradients::disjoint(const Region& a, const Region& b) {
  return a.period == b.period && a.period > 0 && (a.end <= b.begin || b.end <= a.begin);
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

void Gradients::fill(const Tensor& tensor, double value) {
  plan_.record("fill", {}, {tensor}, [tensor, value](Backend& b) { b.fill(tensor.view(), value); });
}

Gradients::Entry& Gradients::entry_of(const Value* root) {
  Entry& entry = entries_[root];
  if (!entry.buffer && entry.loss) {
    entry.buffer = plan_.intermediate(root->shape, root->dtype);
    entry.written = {Region{}};
    fill(entry.buffer, 1.0);
  }
  return entry;
}

// Zeroes what nobody wrote, and marks the whole as written.
void Gradients::complete(const Value* root, Entry& entry) {
  if (entry.written.empty()) {
    fill(entry.buffer, 0.0);
  } else {
    int64_t period = entry.written.front().period, at = 0;
    Tensor rows = entry.buffer.reshape({root->shape.count() / period, period});
    std::sort(entry.written.begin(), entry.written.end(),
              [](const Region& a, const Region& b) { return a.begin < b.begin; });
    for (const Region& region : entry.written) {
      if (region.begin > at) fill(rows.columns(at, region.begin), 0.0);
      at = region.end;
    }
    if (at < period) fill(rows.columns(at, period), 0.0);
  }
  entry.written = {Region{}};
}

// The same for parameters of which only parts were written.
void Gradients::complete_parameters() {
  for (auto& [root, entry] : entries_) {
    if (!root->plan && entry.buffer && !covers(entry, Region{})) complete(root, entry);
  }
}

// Before a buffer shared between several values is changed: a copy, if the producer of another of them is
// still to read it, or is the op at hand.
void Gradients::make_private(const Value* root, Entry& entry) {
  const Value* mine = root_of(entry.buffer);
  bool pending = false;
  for (const auto& [other, theirs] : entries_) {
    if (other == root || !theirs.buffer || root_of(theirs.buffer) != mine) continue;
    for (size_t i = 0; i <= node_ && !pending; ++i) {
      for (const Tensor& tensor : plan_.nodes_[i].writes) pending = pending || root_of(tensor) == other;
    }
  }
  if (!pending) return;
  Tensor from = entry.buffer;
  Tensor to = plan_.intermediate(root->shape, root->dtype);
  plan_.record("copy", {from}, {to}, [from, to](Backend& b) { b.copy(from.view(), {to.view(), false}); });
  entry.buffer = to;
}

bool Gradients::covers(const Entry& entry, const Region& region) {
  return std::any_of(entry.written.begin(), entry.written.end(), [&](const Region& written) {
    return written == Region{} || (written == region && region != irregular);
  });
}

Tensor Gradients::of(const Tensor& y) {
  const Value* root = root_of(y);
  Entry& entry = entry_of(root);
  if (!entry.buffer) entry.buffer = plan_.intermediate(root->shape, root->dtype);
  if (!covers(entry, region_of(y))) complete(root, entry);
  return region_view(entry.buffer, y);
}

Tensor Gradients::updatable(const Tensor& y) {
  const Value* root = root_of(y);
  make_private(root, entry_of(root));
  return of(y);
}

Gradients::Slot Gradients::slot(const Tensor& x) {
  if (!x || !x.requires_grad()) return {};
  Tensor root(x.value().base ? x.value().base : x.shared());
  const bool is_parameter = !root.plan();
  if (is_parameter && !root.value().grad) {
    root.value().grad = parameter(root.shape(), exact_type(root.dtype()), false).shared();
    root.value().grad->name = root.name() + " (gradient)";
  }
  if (is_parameter && !plan_.options_.fresh_gradients)
    return {region_view(Tensor(root.value().grad), x), true};
  Entry& entry = entry_of(&root.value());
  Region region = region_of(x);
  if (!entry.buffer) {
    entry.buffer = is_parameter ? Tensor(root.value().grad) : plan_.intermediate(root.shape(), root.dtype());
  } else if (!is_parameter) {
    make_private(&root.value(), entry);
  }
  if (covers(entry, region)) return {region_view(entry.buffer, x), true};
  bool apart =
      region != irregular && std::all_of(entry.written.begin(), entry.written.end(),
                                         [&](const Region& other) { return disjoint(other, region); });
  if (!apart) {
    complete(&root.value(), entry);
    return {region_view(entry.buffer, x), true};
  }
  entry.written.push_back(region);
  return {region_view(entry.buffer, x), false};
}

void Gradients::share(const Tensor& x, const Tensor& gradient) {
  if (!x.requires_grad()) return;
  Tensor root(x.value().base ? x.value().base : x.shared());
  Entry* entry = root.plan() ? &entry_of(&root.value()) : nullptr;
  if (entry && !entry->buffer && region_of(x) == Region{} && region_of(gradient) == Region{}) {
    entry->buffer = gradient.reshape(root.shape());
    entry->written = {Region{}};
    return;
  }
  Slot to = slot(x);
  plan_.record("copy", {gradient, to.accumulate ? to.tensor : Tensor()}, {to.tensor},
               [gradient, to](Backend& b) { b.copy(gradient.view(), to.view()); });
}

}  // namespace latente

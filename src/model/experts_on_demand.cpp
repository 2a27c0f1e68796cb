#include "model/experts_on_demand.h"

#include <algorithm>
#include <map>

#include "base/memory.h"

namespace latente {

Residency::Piece piece_of(const MappedTensor& mapped, int64_t offset) {
  LATENTE_ASSERT(mapped.file);
  return {mapped.file,
          static_cast<const std::byte*>(mapped.view.data) - mapped.file->bytes().data() + offset};
}

int64_t least_expert_memory(const std::vector<ExpertStack>& stacks, int64_t experts_a_token) {
  std::map<std::string, int64_t> layers;
  for (const ExpertStack& stack : stacks) {
    layers[stack.path.substr(0, stack.path.rfind('.'))] +=
        experts_a_token * Residency::memory_for(stack.bytes);
  }
  int64_t most = 0;
  for (const auto& [path, bytes] : layers) most = std::max(most, bytes);
  return most;
}

void check_memory(int64_t memory, int64_t every_token, int64_t least_of_experts) {
  if (memory >= every_token + least_of_experts) return;
  const auto text = [](int64_t bytes) { return bytes_text(static_cast<double>(bytes)); };
  fail(
      "memory: expected at least {} ({} that every token reads, and {} for the experts of a layer), found {}",
      text(every_token + least_of_experts), text(every_token), text(least_of_experts), text(memory));
}

void read_on_demand(const std::vector<ExpertStack>& stacks, int64_t memory) {
  const auto residency = std::make_shared<Residency>();
  for (const ExpertStack& stack : stacks) {
    // Panels are read as whole vectors.
    const int64_t alignment = stack.view.layout == Layout::panels ? 64 : size_of(stack.view.dtype);
    View view = stack.view;
    view.data = nullptr;
    view.residency = residency.get();
    view.first_piece = residency->add(stack.pieces, stack.bytes, alignment);
    bind_view(stack.tensor, view, residency);
  }
  residency->start(memory);
}

const Residency* residency_of(Transformer& model) {
  const Residency* found = nullptr;
  model.for_each([&](const std::string&, Tensor& tensor) {
    if (const Residency* each = tensor.view().residency) found = each;
  });
  return found;
}

}  // namespace latente

#include "infer/uncached_pass.h"

#include <numeric>

#include "model/layers.h"

namespace latente {

UncachedPass::UncachedPass(Backend& backend, const Transformer& model, int64_t count, PlanOptions options)
    : plan(backend, options) {
  Step at;
  at.positions = plan.input("positions", {count}, DType::i32);
  at.starts = plan.input("starts", {count}, DType::i32);
  at.rope_table = make_rope_table(backend, model.config(), count);
  ids = plan.input("ids", {count}, DType::i32);
  hidden = model.hidden(ids, at);
  plan.keep(hidden);
  plan.compile();
  plan.allocate();

  std::vector<int32_t> values(static_cast<size_t>(count));
  backend.upload(values.data(), at.starts.view());
  std::iota(values.begin(), values.end(), 0);
  backend.upload(values.data(), at.positions.view());
}

}  // namespace latente

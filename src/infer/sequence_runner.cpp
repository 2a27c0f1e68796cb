#include "infer/sequence_runner.h"

namespace latente {
namespace {

RunnerOptions for_one(RunnerOptions options, const Transformer& model) {
  options.sequences = 1;
  options.pages = 0;
  // Modules run after the main model has run a chunk or two.
  options.states = model.mtp.empty() ? 0 : std::min(options.context, 2 * options.chunk + 16);
  return options;
}

}  // namespace

SequenceRunner::SequenceRunner(Backend& backend, const Transformer& model, RunnerOptions options)
    : runner_(backend, model, for_one(options, model)) {
  for (int64_t page = 0; page < runner_.pages(); ++page)
    runner_.set_page(0, page, static_cast<int32_t>(page));
}

int32_t SequenceRunner::state_of(int64_t position) const {
  const int64_t states = runner_.options().states;
  return states == 0 ? -1 : static_cast<int32_t>(position % states);
}

Runner::Pass SequenceRunner::pass(int64_t module, std::span<const int32_t> tokens, int64_t first,
                                  int64_t wanted) {
  const int64_t count = std::ssize(tokens);
  LATENTE_ASSERT(count > 0 && wanted <= count && first >= 0 && first + count <= runner_.options().context);
  Runner::Pass pass{module, std::max<int64_t>(module, 0), runner_.form_for(first, count)};
  for (int64_t i = 0; i < count; ++i) {
    const int32_t state = state_of(first + i);
    pass.rows.push_back({tokens[static_cast<size_t>(i)], static_cast<int32_t>(first + i), 0, state, state,
                         i >= count - wanted});
  }
  return pass;
}

std::span<float> SequenceRunner::forward(std::span<const int32_t> tokens, int64_t first, int64_t wanted) {
  return runner_.run(pass(-1, tokens, first, wanted), Runner::Asked::logits).logits;
}

std::span<float> SequenceRunner::predict(int64_t k, std::span<const int32_t> later, int64_t first) {
  return runner_.run(pass(k, later, first, 1), Runner::Asked::logits).logits;
}

}  // namespace latente

// A sequence in the engine: its tokens, how far each level of the model has run, and the pages it holds.
#pragma once

#include <algorithm>
#include <chrono>

#include "infer/generation.h"
#include "infer/runner.h"

namespace latente {

struct Sequence;
// Whether the passes that all of these share choose their tokens, so that nobody needs logits.
bool chosen_by_passes(std::span<Sequence* const> sequences);

struct Sequence {
  uint64_t id = 0;
  Request request;
  Random random{0};
  GenerationStats stats;

  std::vector<int32_t> tokens;  // prompt, then what was written
  int64_t prompt = 0;           // length of the prompt
  int64_t processed = 0;        // positions the main model has run
  int64_t unread = 0;  // positions it has to run before decoding (goes on), all tokens but the last at most
  std::vector<int64_t> predicted;  // by module: positions run with known tokens
  // The modules' context begins here, at the beginning of a page; -1 = they have lost the thread: the hidden
  // states that they would go on from are gone.
  int64_t modules_from = 0;
  int64_t states_from = 0;   // hidden states before this position were never computed
  int64_t depth = 0;         // drafts of modules a pass, at most
  bool adaptive = false;     // as many as pay
  bool by_position = false;  // a token depends on the seed, its position and its distribution alone
  // Behind the last token, and behind the last draft; null = anything may follow.
  std::unique_ptr<TokenConstraint> constraint, ahead;

  int32_t place = -1;                           // in the runner; -1 = waiting
  std::vector<int32_t> pages;                   // held
  int64_t remembered = 0;                       // tokens whose pages the pool remembers already
  int64_t passed_over = 0;                      // later ones that began before it
  bool cancelled = false, interrupted = false;  // it ends before the next step, without and with on_finish

  struct Draft {
    int32_t token;  // 0 as long as a chain has not chosen it
    Distribution distribution;
    int32_t row = -1;  // of the chain that chooses it, among wanted ones
  };
  std::vector<Draft> drafts;  // of the current pass
  bool looked_up = false;     // they came from the sequence itself
  bool ended = false;         // its last token is written
  bool finished = false;      // and its pages are given back

  using Clock = std::chrono::steady_clock;
  static double seconds_between(Clock::time_point begin, Clock::time_point end) {
    return std::chrono::duration<double>(end - begin).count();
  }
  Clock::time_point submitted, started, first_token;

  int64_t reported = 1;  // tokens of the prompt whose log-probabilities are reported, the first having none

  bool reading() const { return processed < unread; }
  // What the current exception says ends this sequence alone.
  void fail_with_current() {
    stats.error = std::current_exception();
    stats.finish = Finish::failed;
    ended = true;
  }
  void draft_from_here() { ahead = constraint ? constraint->fork() : nullptr; }
  // Whether the constraint lets a draft come behind those before it. One that it cannot follow is not
  // drafted: without drafts the text might never have come there.
  bool may_draft(int32_t token) {
    try {
      return !ahead || ahead->accept(token);
    } catch (const Error&) {
      return false;
    }
  }
  // Whether passes choose its tokens; else that takes logits. It depends on what was asked alone, since the
  // two round differently.
  bool chosen_by_passes() const {
    const SamplingOptions& sampling = request.options.sampling;
    return sampling.by_rank() && (sampling.greedy() || by_position) && !constraint &&
           request.options.top_logprobs < 0;
  }
  // How the token of a position is chosen.
  Choice choice(int64_t position) {
    if (!chosen_by_passes()) return {};
    const SamplingOptions& sampling = request.options.sampling;
    Choice choice{.top_k = static_cast<int32_t>(std::min<int64_t>(sampling.top_k, INT32_MAX)),
                  .top_p = static_cast<float>(sampling.top_p),
                  .min_p = static_cast<float>(sampling.min_p)};
    choice.set_temperature(sampling.temperature);
    choice.set_number(number_of(position));
    return choice;
  }
  // The token of a position.
  int32_t draw(const Distribution& distribution, int64_t position) {
    return by_position ? token_at(distribution, number_of(position)) : sample(distribution, random);
  }
  // The random number that belongs to a position.
  double number_of(int64_t position) {
    random.seek(2 * static_cast<uint64_t>(position));  // words that a uniform number takes
    return random.uniform();
  }
  bool reports_prompt() const { return request.options.prompt_logprobs; }
  bool writes() const { return request.options.max_tokens > 0; }
  History history() const { return {tokens, static_cast<size_t>(prompt)}; }
  int64_t length() const { return static_cast<int64_t>(tokens.size()); }
  bool lost() const { return modules_from < 0; }
  // Tokens the modules in use are behind the main model.
  int64_t behind() const {
    int64_t most = 0;
    for (int64_t k = 0; k < depth && k < static_cast<int64_t>(predicted.size()); ++k)
      most = std::max(most, processed - predicted[static_cast<size_t>(k)]);
    return most;
  }
};

}  // namespace latente

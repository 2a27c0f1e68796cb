// A sequence in the engine: its tokens, how far each level of the model has run, and the pages it holds.
#pragma once

#include <algorithm>
#include <chrono>

#include "infer/generation.h"
#include "infer/runner.h"

namespace latente {

struct Sequence;
// What has to be asked of a pass that all of these share.
Runner::Asked asked_by(std::span<Sequence* const> sequences);

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
    int32_t token;
    Distribution distribution;
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
  // Whether the most likely token of a row is all that is to be known of it.
  bool plain() const {
    return request.options.sampling.plain() && !constraint && request.options.top_logprobs < 0;
  }
  // The token of a position.
  int32_t draw(const Distribution& distribution, int64_t position) {
    if (!by_position) return sample(distribution, random);
    random.seek(2 * static_cast<uint64_t>(position));  // words that a uniform number takes
    return token_at(distribution, random.uniform());
  }
  Runner::Asked asked() const { return plain() ? Runner::Asked::likely : Runner::Asked::logits; }
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

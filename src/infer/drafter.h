// Drafter: proposes tokens. It runs the MTP modules of many sequences in common passes (DeepSeek-V3 report,
// section 2.2) and keeps the hidden states they read, or looks up what followed the last few tokens before.
#pragma once

#include "infer/runner.h"
#include "infer/sequence.h"

namespace latente {

// What a pass of the main model did for a sequence: its rows begin at `row` of the pass.
struct Stretch {
  int64_t first = 0, count = 0, row = 0;
};

class Drafter {
 public:
  // Hidden states the runner must keep.
  static int64_t states_for(int64_t sequences, int64_t chunk);

  explicit Drafter(Runner& runner) : runner_(&runner) {}

  // Where the hidden state of `position` is left by the last pass, or was by those before.
  int32_t state_of(const Sequence& sequence, int64_t position, const Stretch& last = {}) const;

  // A sequence whose modules are to catch up; `last` if that pass has just been run.
  struct Behind {
    Sequence* sequence;
    Stretch last{};
  };
  // Runs the modules in use over the positions whose later tokens are known, of all sequences together. The
  // modules may be up to most_behind positions behind what ran before the last pass.
  void catch_up(std::span<const Behind> sequences);
  void catch_up(Sequence& sequence) { catch_up(std::vector{Behind{&sequence}}); }
  static constexpr int64_t most_behind = 64;
  // Modules that are to be left behind have lost the thread when they are that far.
  void let_lie(Sequence& sequence);
  // Lets modules that have lost it begin anew, with a context that begins not far back. Drafts may be worse
  // for it; the text is the same. False where no page begins among the positions whose states are kept.
  bool begin_anew(Sequence& sequence);

  // Drafts wanted[i] tokens for sequences[i], whose modules must be at most a few positions behind. If they
  // are chained, passes choose them: they are only put into the chain, and drafts are rows of it until it has
  // been run.
  void draft(std::span<Sequence* const> sequences, std::span<const int64_t> wanted,
             std::vector<Runner::Pass>* chain = nullptr);

  // Up to `most` tokens that followed the last few tokens where these occurred before, the latest place and
  // the longest agreement first. Nothing unless at least `shortest` tokens agree.
  static std::vector<int32_t> look_up(std::span<const int32_t> tokens, int64_t most);
  static constexpr int64_t shortest = 3, longest = 8;

 private:
  Runner::Pass pass_of(int64_t draft, std::span<Sequence* const> sequences) const;
  void draw(Sequence& sequence, Outcome row);

  Runner* runner_;
  std::vector<int32_t> sequence_;  // with its drafts
};

}  // namespace latente

// How many tokens to draft: as many as pay, by what passes have cost and how often drafts were accepted.
//
// A pass with n drafts yields 1 + a1 + a1·a2 + ... tokens, a_i being the acceptance of the i-th draft after
// its predecessors (Leviathan et al. 2023, section 3.3, with measured instead of assumed figures). What has
// not been tried for long is tried again, ever more rarely while it loses; what all trials together lose
// against the best is some passes and a hundredth of the time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace latente {

class DraftLength {
 public:
  // `acceptance` is assumed until measured: by default what DeepSeek-V3's report has for its module. What is
  // tried anew is tried for `trials` passes.
  explicit DraftLength(int64_t most = 0, double acceptance = usual_acceptance, int64_t trials = usual_trials);
  static constexpr double usual_acceptance = 0.85;
  static constexpr int64_t usual_trials = 12;

  int64_t most() const { return static_cast<int64_t>(choices_.size()) - 1; }
  // Tokens to draft in the next pass, 0 to most(). More than pay are tried one at a time.
  int64_t choose();
  // Whether it may come to drafting soon: drafts pay, or that is not known yet.
  bool promising() const;
  // What came of a sequence's drafts in a pass: `accepted` of them were right.
  void judge(int64_t drafted, int64_t accepted);
  // What a pass with `drafted` tokens (a sequence) cost; `share` of the sequences that it served had drafts.
  // A pass that had unusual work to do (a plan to record, other passes to make up for) says nothing of the
  // usual cost.
  void time(int64_t drafted, double seconds, bool unusual, double share = 1);

 private:
  struct Choice {
    double seconds = 0;  // of a pass, smoothed
    double share = 1;    // of sequences with drafts, smoothed
    int64_t passes = 0;  // measured
    int64_t last = 0;    // pass when it was last chosen
    int64_t wait;        // passes until it is tried again
    int64_t trial;       // passes to measure in the current trial
  };
  static constexpr int64_t first_wait = 96, longest_wait = 1 << 10;
  static constexpr double most_lost = 0.01;  // of the time; and some passes, to begin with
  static constexpr double passes_to_lose = 3;

  double tokens(size_t drafts) const;  // of a pass, a sequence
  double rate(size_t drafts) const { return tokens(drafts) / choices_[drafts].seconds; }
  size_t tried() const;  // choices measured, without a gap
  size_t best() const;   // of them; one must have been tried
  bool affordable() const { return lost_ <= most_lost * spent_ + passes_to_lose * choices_[0].seconds; }
  // Untried ones are tried where one less is the best so far.
  bool may_try(size_t drafts) const { return drafts < tried() || drafts == best() + 1; }

  std::vector<Choice> choices_;     // by number of drafts
  std::vector<double> acceptance_;  // of the i-th draft, smoothed
  std::vector<int64_t> judged_;
  int64_t trials_, pass_ = 0;
  bool trying_ = false;          // in the current pass
  double spent_ = 0, lost_ = 0;  // seconds, in all and by trials
};

}  // namespace latente

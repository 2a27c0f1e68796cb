// How many tokens to draft: as many as pay, by what passes have cost and how often drafts were accepted.
//
// A pass with n drafts yields 1 + a1 + a1·a2 + ... tokens, a_i being the acceptance of the i-th draft after
// its predecessors (Leviathan et al. 2023, section 3.3, with measured instead of assumed figures). What has
// not been tried for long is tried again, ever more rarely while it loses.
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
  // Tokens to draft in the next pass, 0 to most().
  int64_t choose();
  // What came of a sequence's drafts in a pass: `accepted` of them were right.
  void judge(int64_t drafted, int64_t accepted);
  // What a pass with `drafted` tokens (a sequence) cost. One that had unusual work to do (a plan to record,
  // other passes to make up for) says nothing of the usual cost.
  void time(int64_t drafted, double seconds, bool unusual);

 private:
  struct Choice {
    double seconds = 0;  // of a pass, smoothed
    int64_t passes = 0;  // measured
    int64_t last = 0;    // pass when it was last chosen
    int64_t wait;        // passes until it is tried again
    int64_t trial;       // passes left of the current trial
  };
  static constexpr int64_t first_wait = 96, longest_wait = 1 << 14;

  double rate(size_t drafts) const;  // tokens a second

  std::vector<Choice> choices_;     // by number of drafts
  std::vector<double> acceptance_;  // of the i-th draft, smoothed
  std::vector<int64_t> judged_;
  int64_t trials_, pass_ = 0;
};

}  // namespace latente

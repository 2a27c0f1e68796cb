// How many tokens to draft: as many as pay, by what passes have cost and how often drafts were accepted.
//
// A pass with n drafts yields 1 + a1 + a1·a2 + ... tokens, a_i being the acceptance of the i-th draft after
// its predecessors (Leviathan et al. 2023, section 3.3, with measured instead of assumed figures). What it
// costs more than a plain pass is measured in trials only, each trial pass against the passes around it: the
// machine may be faster or slower a moment later, and contexts grow. What has not been tried for long is
// tried again, ever more rarely while it loses; what all trials together lose against the best is a pass or
// two and a hundredth of the time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace latente {

class DraftLength {
 public:
  // `acceptance` is assumed until measured: by default what DeepSeek-V3's report has for its module. What is
  // tried is tried in `trials` passes, and not before `begin` seconds of passes: trials are plans to record
  // and modules to bring up, which a short run does not earn back where gains are small.
  explicit DraftLength(int64_t most = 0, double acceptance = usual_acceptance, int64_t trials = usual_trials,
                       double begin = 0);
  static constexpr double usual_acceptance = 0.85;
  static constexpr int64_t usual_trials = 12;

  int64_t most() const { return static_cast<int64_t>(choices_.size()) - 1; }
  // Tokens to draft in the next pass, 0 to most(). More than pay are tried one at a time. `otherwise`: the
  // rate() of what could be done instead.
  int64_t choose(double otherwise = 1);
  // Whether what was chosen last is a trial: where many sequences share a pass, some of them are enough.
  bool trying() const { return trying_; }
  // Whether drafts pay, or may soon be tried for the first time. Modules that keep up for a trial which is
  // too dear for now would cost as much as drafting.
  bool pays() const { return in_use_ > 0 || (most() > 0 && choices_[1].measured == 0 && affordable()); }
  // Tokens of a sequence in the time of a plain pass, with as many drafts as pay.
  double rate() const { return rate(in_use_); }
  // What a pass with so many drafts for every sequence costs more than a plain one, in plain passes; nothing
  // while that is not known.
  std::optional<double> cost(int64_t drafts) const;
  // What came of a sequence's drafts in a pass: `accepted` of them were right.
  void judge(int64_t drafted, int64_t accepted);
  // What a pass with `drafted` tokens (a sequence) cost; `share` of the sequences that it served had drafts.
  // A pass that had unusual work to do (other passes to make up for) says nothing of the usual cost.
  void time(int64_t drafted, double seconds, bool unusual, double share = 1);

 private:
  struct Choice {
    double cost = 0;             // beyond a plain pass's 1, with drafts for all
    int64_t measured = 0;        // trials that said so
    int64_t last = 0;            // pass of the last trial
    int64_t wait = 0;            // passes until the next one
    int64_t trial = 0;           // passes that are left of the current one
    std::vector<double> sample;  // what they have said
  };
  static constexpr int64_t first_wait = 96, longest_wait = 1 << 10;
  static constexpr int64_t confirming_wait = 4;  // from taking up drafting until plain decoding is tried
  static constexpr double most_lost = 0.007;     // of the time; and some passes, to begin with
  static constexpr double passes_to_lose = 1.5;
  static constexpr double margin = 0.05;  // by which drafting has to pay: costs are uncertain by so much

  double tokens(size_t drafts, double share = 1) const;  // of a pass, a sequence
  double rate(size_t drafts) const { return tokens(drafts) / (1 + choices_[drafts].cost); }
  size_t best(double otherwise) const;  // of what was measured
  bool affordable() const {
    return spent_ >= begin_ && lost_ <= most_lost * spent_ + passes_to_lose * plain_;
  }
  void take_up(size_t drafts);
  void measure(Choice& choice, double seconds, double share);

  std::vector<Choice> choices_;     // by number of drafts
  std::vector<double> acceptance_;  // of the i-th draft, smoothed
  std::vector<int64_t> judged_;
  int64_t trials_, pass_ = 0, plain_passes_ = 0;
  double begin_;
  double plain_ = 0;  // seconds of a plain pass now, smoothed
  size_t in_use_ = 0, chosen_ = 0;
  bool trying_ = false;          // in the current pass
  double spent_ = 0, lost_ = 0;  // seconds, in all and by trials
};

}  // namespace latente

#include "infer/draft_length.h"

#include <algorithm>

namespace latente {
namespace {

// The lower of two in the middle.
double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<ptrdiff_t>((values.size() - 1) / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

DraftLength::DraftLength(int64_t most, double acceptance, int64_t trials, double begin)
    : choices_(static_cast<size_t>(most + 1)),
      // As good as eight passes, lest the first few decide.
      acceptance_(static_cast<size_t>(most), acceptance),
      judged_(static_cast<size_t>(most), 8),
      trials_(trials),
      begin_(begin) {
  choices_[0].measured = 1;
}

double DraftLength::tokens(size_t drafts, double share) const {
  double gained = 0, right = 1;
  for (size_t i = 0; i < drafts; ++i) gained += right *= acceptance_[i];
  return 1 + share * gained;
}

std::optional<double> DraftLength::cost(int64_t drafts) const {
  const Choice& choice = choices_[static_cast<size_t>(std::min(drafts, most()))];
  return choice.measured > 0 ? std::optional(choice.cost) : std::nullopt;
}

size_t DraftLength::best(double otherwise) const {
  size_t best = 0;
  double most = otherwise * (1 + margin);
  for (size_t n = 1; n < choices_.size() && choices_[n].measured > 0; ++n) {
    if (rate(n) > most) most = rate(n), best = n;
  }
  return best;
}

void DraftLength::take_up(size_t drafts) {
  if (drafts == in_use_) return;
  Choice& before = choices_[in_use_];
  before.last = pass_;
  before.wait = in_use_ == 0 ? confirming_wait : std::max(before.wait, first_wait);
  in_use_ = drafts;
}

int64_t DraftLength::choose(double otherwise) {
  ++pass_;
  const bool tried_before = trying_;
  trying_ = false;
  take_up(best(otherwise));
  chosen_ = in_use_;
  // Between two passes of a trial there is one to compare with.
  constexpr int64_t to_begin_with = 3;
  if (!tried_before && plain_passes_ >= to_begin_with && affordable()) {
    for (size_t n = choices_.size(); n-- > 0 && !trying_;) {
      Choice& choice = choices_[n];
      // Untried ones are tried where one less is the best so far.
      if (n == in_use_ || (choice.measured == 0 && n != in_use_ + 1)) continue;
      if (choice.trial == 0 && pass_ - choice.last >= choice.wait) {
        choice.trial = n == 0 ? std::min<int64_t>(trials_, 3) : trials_;
        choice.sample.clear();
        choice.wait = std::clamp(2 * choice.wait, n == 0 ? confirming_wait : first_wait, longest_wait);
      }
      if (choice.trial == 0) continue;
      choice.last = pass_;
      chosen_ = n;
      trying_ = true;
    }
  }
  return static_cast<int64_t>(chosen_);
}

void DraftLength::judge(int64_t drafted, int64_t accepted) {
  for (size_t i = 0; i < static_cast<size_t>(drafted) && static_cast<int64_t>(i) <= accepted; ++i) {
    const double right = static_cast<int64_t>(i) < accepted ? 1 : 0;
    const double weight = std::max(1.0 / static_cast<double>(++judged_[i]), 0.05);
    acceptance_[i] += weight * (right - acceptance_[i]);
  }
}

// A pass of a trial. Any pass may be interrupted: the median decides.
void DraftLength::measure(Choice& choice, double seconds, double share) {
  const bool plain = &choice == &choices_[0];
  choice.sample.push_back(plain ? seconds / plain_ : (seconds / plain_ - 1) / share);
  --choice.trial;
  const double found = median(choice.sample);
  // What loses a lot need not be known well, nor tried soon again: modules have much to make up for then.
  constexpr size_t enough = 2;
  constexpr double hopeless = 0.9;
  constexpr int64_t long_wait = 384;
  const auto drafts = static_cast<size_t>(&choice - choices_.data());
  if (!plain && choice.sample.size() >= enough && tokens(drafts) < hopeless * (1 + found)) {
    choice.trial = 0;
    choice.wait = std::max(choice.wait, long_wait);
  }
  if (choice.trial > 0) return;
  ++choice.measured;
  if (plain) {
    plain_ *= found;
    for (size_t n = 1; n < choices_.size(); ++n) choices_[n].cost = (1 + choices_[n].cost) / found - 1;
  } else {
    choice.cost = std::max(found, 0.0);
  }
}

void DraftLength::time(int64_t drafted, double seconds, bool unusual, double share) {
  const auto n = static_cast<size_t>(std::min(drafted, most()));
  Choice& choice = choices_[n];
  spent_ += seconds;
  // Catching up may cost some passes; what takes longer was interrupted.
  constexpr double most_passes = 3;
  if (trying_)
    lost_ += std::max(std::min(seconds, most_passes * plain_) - plain_ * tokens(n, share) / rate(), 0.0);
  if (unusual) return;
  if (trying_) {
    if (n == chosen_ && choice.trial > 0) measure(choice, seconds, share);
  } else if (choice.measured > 0) {
    // As long as the costs are what they were, this says how fast the machine is now.
    double now = seconds / (1 + share * choice.cost);
    if (plain_passes_ > 0) now = std::min(now, 2 * plain_);
    plain_ += std::max(1.0 / static_cast<double>(++plain_passes_), 0.2) * (now - plain_);
  }
}

}  // namespace latente

#include "infer/draft_length.h"

#include <algorithm>

namespace latente {

DraftLength::DraftLength(int64_t most, double acceptance, int64_t trials)
    : choices_(static_cast<size_t>(most + 1)),
      // As good as eight passes, lest the first few decide.
      acceptance_(static_cast<size_t>(most), acceptance),
      judged_(static_cast<size_t>(most), 8),
      trials_(trials) {
  for (Choice& choice : choices_) choice.wait = first_wait, choice.trial = trials;
}

double DraftLength::tokens(size_t drafts) const {
  double gained = 0, right = 1;
  for (size_t i = 0; i < drafts; ++i) gained += right *= acceptance_[i];
  return 1 + choices_[drafts].share * gained;
}

size_t DraftLength::tried() const {
  size_t n = 0;
  while (n < choices_.size() && choices_[n].passes > 0) ++n;
  return n;
}

size_t DraftLength::best() const {
  size_t best = 0;
  for (size_t n = 1; n < tried(); ++n) {
    // What is measured is uncertain by a few percent: drafting has to show that it pays.
    if (rate(n) > rate(best) * (best == 0 ? 1.03 : 1)) best = n;
  }
  return best;
}

int64_t DraftLength::choose() {
  ++pass_;
  trying_ = false;
  size_t chosen = 0;
  if (tried() > 0) {
    const size_t pays = chosen = best();
    for (size_t n = choices_.size(); n-- > 0 && chosen == pays && affordable();) {
      if (n == pays || !may_try(n)) continue;
      Choice& choice = choices_[n];
      if (choice.trial == 0 && pass_ - choice.last >= choice.wait) {
        choice.trial = trials_;
        choice.passes = std::min<int64_t>(choice.passes, 1);  // the machine may be faster or slower now
        choice.wait = std::min(2 * choice.wait, longest_wait);
      }
      if (choice.trial > 0) chosen = n;
    }
    if (chosen == pays) {
      choices_[chosen].wait = first_wait;
    } else {
      trying_ = true;
    }
  }
  choices_[chosen].last = pass_;
  return static_cast<int64_t>(chosen);
}

bool DraftLength::promising() const {
  if (most() == 0) return false;
  if (tried() == 0 || best() > 0) return true;
  for (size_t n = 1; n < choices_.size(); ++n) {
    if (may_try(n) && choices_[n].trial > 0) return affordable();
  }
  return false;
}

void DraftLength::judge(int64_t drafted, int64_t accepted) {
  for (size_t i = 0; i < static_cast<size_t>(drafted) && static_cast<int64_t>(i) <= accepted; ++i) {
    const double right = static_cast<int64_t>(i) < accepted ? 1 : 0;
    const double weight = std::max(1.0 / static_cast<double>(++judged_[i]), 0.05);
    acceptance_[i] += weight * (right - acceptance_[i]);
  }
}

void DraftLength::time(int64_t drafted, double seconds, bool unusual, double share) {
  const auto n = static_cast<size_t>(std::min(drafted, most()));
  Choice& choice = choices_[n];
  spent_ += seconds;
  if (trying_ && tried() > 0) lost_ += std::max(seconds - tokens(n) / rate(best()), 0.0);
  trying_ = false;
  if (unusual) return;
  choice.trial = std::max<int64_t>(choice.trial - 1, 0);
  // Any pass may be interrupted: what takes far longer than usual counts little.
  if (choice.passes > 0) seconds = std::min(seconds, 2 * choice.seconds);
  const double weight = std::max(1.0 / static_cast<double>(choice.passes + 1), 0.1);
  choice.seconds += weight * (seconds - choice.seconds);
  choice.share += weight * (share - choice.share);
  ++choice.passes;
}

}  // namespace latente

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

double DraftLength::rate(size_t drafts) const {
  double tokens = 1, right = 1;
  for (size_t i = 0; i < drafts; ++i) tokens += right *= acceptance_[i];
  return tokens / choices_[drafts].seconds;
}

int64_t DraftLength::choose() {
  ++pass_;
  size_t best = 0;
  for (size_t n = choices_.size(); n-- > 0;) {
    if (choices_[n].passes == 0) {  // untried: the longest first
      best = n;
      break;
    }
    if (rate(n) > rate(best)) best = n;
  }
  size_t chosen = best;
  for (size_t n = 0; n < choices_.size() && choices_[best].passes > 0; ++n) {
    Choice& choice = choices_[n];
    if (n == best) continue;
    if (choice.trial == 0 && pass_ - choice.last >= choice.wait) {
      choice.trial = trials_;
      choice.wait = std::min(2 * choice.wait, longest_wait);
    }
    if (choice.trial > 0) {
      chosen = n;
      break;
    }
  }
  Choice& choice = choices_[chosen];
  choice.last = pass_;
  choice.trial = std::max<int64_t>(choice.trial - 1, 0);
  if (chosen == best) choice.wait = first_wait;
  return static_cast<int64_t>(chosen);
}

void DraftLength::judge(int64_t drafted, int64_t accepted) {
  for (size_t i = 0; i < static_cast<size_t>(drafted) && static_cast<int64_t>(i) <= accepted; ++i) {
    const double right = static_cast<int64_t>(i) < accepted ? 1 : 0;
    const double weight = std::max(1.0 / static_cast<double>(++judged_[i]), 0.05);
    acceptance_[i] += weight * (right - acceptance_[i]);
  }
}

void DraftLength::time(int64_t drafted, double seconds, bool unusual) {
  if (unusual) return;
  Choice& choice = choices_[static_cast<size_t>(std::min(drafted, most()))];
  // Any pass may be interrupted: what takes far longer than usual counts little.
  if (choice.passes > 0) seconds = std::min(seconds, 2 * choice.seconds);
  const double weight = std::max(1.0 / static_cast<double>(choice.passes + 1), 0.1);
  choice.seconds += weight * (seconds - choice.seconds);
  ++choice.passes;
}

}  // namespace latente

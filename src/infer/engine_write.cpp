// Writing on in the sequences that have read their own: an Engine's members that draft, verify and decide.
#include <algorithm>

#include "infer/engine.h"

namespace latente {
namespace {

constexpr int64_t most_looked_up = 4;
constexpr int64_t usually_behind = 4;  // modules are so when drafts alternate with none, or are refused
constexpr size_t all_try = 8;          // of more sequences a part tries what may not pay

// Those that have least to make up for.
void keep_nearest(std::vector<Sequence*>& sequences, size_t count) {
  const auto distance = [](const Sequence* s) { return s->lost() ? Drafter::most_behind : s->behind(); };
  std::stable_sort(sequences.begin(), sequences.end(),
                   [&](const Sequence* a, const Sequence* b) { return distance(a) < distance(b); });
  sequences.resize(count);
}

// With a seed the token is what it would be without drafts, and a draft is right if it is the same. Else more
// are: those that speculative sampling accepts.
Verdict judge(Sequence& s, const Distribution& distribution, const Sequence::Draft& draft) {
  if (!s.by_position) return verify(distribution, draft.distribution, draft.token, s.random);
  const int32_t token = s.draw(distribution, s.length());
  return {token == draft.token, token};
}

}  // namespace

Engine::Lengths& Engine::lengths_for(size_t sequences) {
  int64_t bucket = 1;
  while (bucket < static_cast<int64_t>(sequences)) bucket *= 2;
  auto found = lengths_.find(bucket);
  if (found == lengths_.end()) {
    // A pass of many sequences judges many drafts; what it costs takes a few passes to know.
    const int64_t trials = std::max<int64_t>(3, DraftLength::usual_trials / bucket);
    // For one sequence drafting most likely pays.
    const double begin = bucket == 1 ? 0 : first_trial_ * std::max(1.0, static_cast<double>(bucket) / 16);
    found = lengths_
                .emplace(bucket,
                         Lengths{DraftLength(runner_.modules(), DraftLength::usual_acceptance, trials, begin),
                                 DraftLength(most_looked_up, 0.5, std::min<int64_t>(4, trials), begin)})
                .first;
  }
  return found->second;
}

bool Engine::keeps_up(const Sequence& s, size_t sequences) {
  return !s.adaptive || lengths_for(sequences).modules.pays();
}

bool Engine::propose(std::span<Sequence* const> sequences, std::vector<Runner::Pass>* chain) {
  Lengths& lengths = lengths_for(sequences.size());
  int64_t by_look_up = -1;  // chosen when somebody asks
  const auto room = [&](const Sequence& s) { return room_of(s) - 1; };
  std::vector<Sequence*> drafting, adaptive;
  std::vector<Drafter::Behind> behind;
  std::vector<int64_t> counts;
  for (Sequence* s : sequences) {
    s->drafts.clear();
    s->looked_up = false;
    if (room(*s) <= 0) continue;
    if (s->adaptive) {
      const std::vector<int32_t> found = Drafter::look_up(s->tokens, std::min(room(*s), most_looked_up));
      if (!found.empty()) s->draft_from_here();
      if (!found.empty() && by_look_up < 0)
        by_look_up = lengths.looked_up.choose(s->depth > 0 ? lengths.modules.rate() : 1.0);
      for (int64_t i = 0; i < std::min(by_look_up, static_cast<int64_t>(found.size())); ++i) {
        const int32_t token = found[static_cast<size_t>(i)];
        if (!s->may_draft(token)) break;
        s->drafts.push_back({token, {{token, 1.0}}});
      }
      s->looked_up = !s->drafts.empty();
    }
    if (s->looked_up || s->depth == 0) continue;
    (s->adaptive ? adaptive : drafting).push_back(s);
  }
  for (const Sequence* s : drafting) counts.push_back(std::min(room(*s), s->depth));
  if (!adaptive.empty()) {
    const int64_t count = lengths.modules.choose();
    if (lengths.modules.trying() && adaptive.size() > all_try) keep_nearest(adaptive, adaptive.size() / 4);
    for (Sequence* s : adaptive) {
      if (count == 0 || (s->lost() && !drafter_.begin_anew(*s))) continue;
      drafting.push_back(s);
      counts.push_back(std::min(room(*s), count));
    }
  }
  for (Sequence* s : drafting) {
    if (s->behind() > s->depth + usually_behind) behind.push_back({s});
  }
  drafter_.catch_up(behind);
  drafter_.draft(drafting, counts, chain);
  return !behind.empty();
}

// Those that write in the next pass, in turn where not all fit, each with pages for its tokens.
std::vector<Sequence*> Engine::writers() {
  std::vector<Sequence*> ready;
  for (const Pointer& s : running_) {
    if (!s->reading() && !s->finished) ready.push_back(s.get());
  }
  const size_t fit = static_cast<size_t>(std::max<int64_t>(1, runner_.options().chunk / (1 + most_drafts)));
  if (ready.size() > fit) {
    std::rotate(ready.begin(), ready.begin() + static_cast<ptrdiff_t>(turn_ % ready.size()), ready.end());
    ready.resize(fit);
    turn_ += fit;
  }
  const int64_t capacity = std::min(runner_.options().context, pool_.pages() * pool_.page_size());
  for (Sequence* s : ready) {
    if (s->place >= 0) cover(*s, std::min(s->length() + most_drafts, capacity));
  }
  std::erase_if(ready, [](Sequence* s) { return s->place < 0; });  // driven out
  return ready;
}

void Engine::write() {
  const std::vector<Sequence*> sequences = writers();
  if (sequences.empty()) return;
  const auto begin = Sequence::Clock::now();
  const double recording = runner_.recording_seconds();
  std::vector<Drafter::Behind> behind;
  for (Sequence* s : sequences) {
    if (s->lost() || s->behind() < Drafter::most_behind / 2) continue;
    if (keeps_up(*s, sequences.size())) {
      behind.push_back({s});
    } else {
      drafter_.let_lie(*s);
    }
  }
  drafter_.catch_up(behind);
  // The drafts' passes and the one that verifies them, or some that follow one another.
  std::vector<Runner::Pass> chain;
  const bool tokens = chosen_by_passes(sequences);
  const bool caught_up = propose(sequences, chains_ && tokens ? &chain : nullptr) || !behind.empty();
  int64_t drafted = 0;
  for (const Runner::Pass& pass : chain)
    drafted += std::count_if(pass.rows.begin(), pass.rows.end(), [](const Row& row) { return row.wanted; });
  chain.push_back(next_pass(sequences));
  const int64_t passes = chains_ && tokens ? passes_at_once(sequences) : 1;
  for (int64_t i = 1; i < passes; ++i) chain.push_back(following(chain.back(), sequences));

  Outcome outcome = runner_.run(chain, tokens ? Runner::Asked::tokens : Runner::Asked::logits);
  const Outcome drafts = outcome.take(drafted);
  std::vector<int64_t> right(sequences.size());
  for (int64_t pass = 0; pass < passes; ++pass) {
    for (size_t i = 0; i < sequences.size(); ++i) {
      Sequence& s = *sequences[i];
      const Outcome its = outcome.take(1 + std::ssize(s.drafts));
      settle(s, drafts);
      if (!s.ended) right[i] = conclude(s, its);
    }
  }
  for (Sequence* s : sequences) {
    if (s->ended) finish(*s);
  }
  const double seconds = Sequence::seconds_between(begin, Sequence::Clock::now());
  learn(sequences, right, (seconds - (runner_.recording_seconds() - recording)) / static_cast<double>(passes),
        caught_up || outcome.new_plan);
}

// Each sequence's last token and its drafts.
Runner::Pass Engine::next_pass(std::span<Sequence* const> sequences) {
  Runner::Pass pass;
  for (Sequence* s : sequences) {
    if (s->ended) s->drafts.clear();  // drafting failed
    LATENTE_ASSERT(s->processed == s->length() - 1);
    auto add = [&](int32_t token, int32_t follows, int64_t position) {
      const int32_t state = runner_.modules() > 0 ? drafter_.state_of(*s, position) : -1;
      pass.rows.push_back({token, static_cast<int32_t>(position), s->place, 0, state, true,
                           s->choice(position + 1), follows});
    };
    add(s->tokens.back(), -1, s->processed);
    for (size_t i = 0; i < s->drafts.size(); ++i)
      add(s->drafts[i].token, s->drafts[i].row, s->length() + static_cast<int64_t>(i));
  }
  return pass;
}

// The pass behind one that has a row for each sequence, over what that one chooses.
Runner::Pass Engine::following(const Runner::Pass& last, std::span<Sequence* const> sequences) {
  Runner::Pass pass = last;
  const bool first = last.rows.front().follows < 0;
  for (size_t i = 0; i < sequences.size(); ++i) {
    Row& row = pass.rows[i];
    row.follows = first ? static_cast<int32_t>(i) : row.follows + static_cast<int32_t>(sequences.size());
    ++row.position;
    if (row.write >= 0) row.write = drafter_.state_of(*sequences[i], row.position);
    row.choice = sequences[i]->choice(row.position + 1);
  }
  return pass;
}

// Passes that run without the host between them, as many as all have room for. Those behind a stop token are
// for nothing.
int64_t Engine::passes_at_once(std::span<Sequence* const> sequences) {
  const double pass = lengths_for(sequences.size()).plain_pass;
  const bool drafting =
      std::any_of(sequences.begin(), sequences.end(), [](Sequence* s) { return !s->drafts.empty(); });
  if (drafting || pass == 0) return 1;
  int64_t room = static_cast<int64_t>(chain_seconds_ / pass);
  for (const Sequence* s : sequences) room = std::min(room, room_of(*s));
  int64_t passes = 1;
  while (2 * passes <= std::min(room, most_drafts + 1)) passes *= 2;  // few numbers, since each is a plan
  return passes;
}

// Tokens that a sequence may still write.
int64_t Engine::room_of(const Sequence& s) const {
  return std::min({s.request.options.max_tokens - s.stats.generated_tokens,
                   runner_.options().context - s.length(), pool_.pages() * pool_.page_size() - s.length()});
}

// What a pass says about how many drafts pay.
void Engine::learn(std::span<Sequence* const> sequences, std::span<const int64_t> right, double seconds,
                   bool unusual) {
  Lengths& lengths = lengths_for(sequences.size());
  struct Part {
    int64_t sequences = 0, most = 0;
  } looked_up, modules;
  for (size_t i = 0; i < sequences.size(); ++i) {
    const Sequence& s = *sequences[i];
    unusual |= !s.adaptive;
    const int64_t drafted = static_cast<int64_t>(s.drafts.size());
    if (!s.adaptive || drafted == 0) continue;
    (s.looked_up ? lengths.looked_up : lengths.modules).judge(drafted, right[i]);
    Part& part = s.looked_up ? looked_up : modules;
    ++part.sequences;
    part.most = std::max(part.most, drafted);
  }
  if (looked_up.sequences + modules.sequences == 0)
    lengths.plain_pass += (lengths.plain_pass == 0 ? 1 : 0.2) * (seconds - lengths.plain_pass);
  // Each is measured against passes without it, as if the other had not been there.
  const double count = static_cast<double>(sequences.size());
  const auto share = [&](const Part& part) { return static_cast<double>(part.sequences) / count; };
  const auto time = [&](DraftLength& length, const Part& part, const DraftLength& other, const Part& theirs) {
    const std::optional<double> cost = other.cost(theirs.most);
    length.time(part.most, seconds / (1 + share(theirs) * cost.value_or(0)), unusual || !cost, share(part));
  };
  time(lengths.looked_up, looked_up, lengths.modules, modules);
  time(lengths.modules, modules, lengths.looked_up, looked_up);
}

int64_t Engine::conclude(Sequence& s, Outcome outcome) {
  const int64_t rows = 1 + static_cast<int64_t>(s.drafts.size());
  ++s.stats.passes;
  s.stats.drafted += rows - 1;
  int64_t right = 0;
  bool rejected = false;
  try {
    for (const Sequence::Draft& draft : s.drafts) {
      const Next next = next_of(s, outcome.take(1));
      const Verdict verdict = judge(s, next.distribution, draft);
      rejected = !verdict.accepted;
      right += verdict.accepted ? 1 : 0;
      s.stats.accepted += verdict.accepted ? 1 : 0;
      s.ended = !emit(s, verdict.token, verdict.accepted, next);
      if (rejected || s.ended) break;
    }
    if (!rejected && !s.ended) {
      const Next next = next_of(s, outcome.take(1));
      s.ended = !emit(s, s.draw(next.distribution, s.length()), false, next);
    }
  } catch (...) {
    s.fail_with_current();
  }
  s.processed = s.unread = std::min(s.processed + rows, s.length() - 1);
  return right;
}

// The drafts that the chain has chosen.
void Engine::settle(Sequence& s, const Outcome& drafts) {
  try {
    for (Sequence::Draft& draft : s.drafts) {
      if (draft.row < 0) continue;
      draft.token = drafts.chosen[static_cast<size_t>(draft.row)];
      draft.distribution = distribution_of(draft.token);
    }
  } catch (...) {
    s.fail_with_current();
  }
}

Engine::Next Engine::next_of(Sequence& s, Outcome row) {
  Next next;
  if (s.chosen_by_passes()) {
    next.distribution = distribution_of(row.chosen.front());
    return next;
  }
  if (s.request.options.top_logprobs >= 0) next.logits.assign(row.logits.begin(), row.logits.end());
  next.distribution =
      distribution_of(row.logits, s.history(), s.request.options.sampling, admitted_by(s.constraint.get()));
  return next;
}

// Adds a token; false ends the sequence.
bool Engine::emit(Sequence& s, int32_t token, bool drafted, const Next& next) {
  const GenerationOptions& options = s.request.options;
  if (std::find(options.stop_tokens.begin(), options.stop_tokens.end(), token) != options.stop_tokens.end()) {
    s.stats.finish = Finish::stop_token;
    return false;
  }
  s.tokens.push_back(token);
  ++s.stats.generated_tokens;
  TokenLogprobs logprobs;
  const bool reports = options.top_logprobs >= 0;
  if (reports) logprobs = logprobs_of(next.logits, token, options.top_logprobs);
  if (s.request.on_token && !s.request.on_token({token, drafted, reports ? &logprobs : nullptr, &s.stats})) {
    s.stats.finish = Finish::interrupted;
    return false;
  }
  s.stats.finish = Finish::complete;
  if (s.constraint && s.constraint->accept(token) && s.constraint->finished()) return false;
  s.stats.finish = Finish::length;
  if (s.stats.generated_tokens >= options.max_tokens) return false;
  s.stats.finish = Finish::context_full;
  return s.length() < std::min(runner_.options().context, pool_.pages() * pool_.page_size());
}

}  // namespace latente

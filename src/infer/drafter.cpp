#include "infer/drafter.h"

#include <algorithm>

namespace latente {
namespace {

// A sequence keeps the hidden states of its last positions in a ring of its own. What a long pass computes
// before them lies in a place that all sequences share, and is read right after that pass.
constexpr int64_t ring = 2 * Drafter::most_behind;

}  // namespace

int64_t Drafter::states_for(int64_t sequences, int64_t chunk) { return sequences * ring + chunk; }

int32_t Drafter::state_of(const Sequence& sequence, int64_t position, const Stretch& last) const {
  const int64_t early = last.count - ring / 2;  // positions of that pass that have no place in the ring
  if (position >= last.first && position - last.first < early)
    return static_cast<int32_t>(runner_->options().sequences * ring + last.row + position - last.first);
  return static_cast<int32_t>(sequence.place * ring + position % ring);
}

void Drafter::let_lie(Sequence& s) {
  // A pass over the next piece of a prompt may overwrite any state.
  if (s.behind() > (s.reading() ? 0 : most_behind)) s.modules_from = -1;
}

bool Drafter::begin_anew(Sequence& s) {
  const int64_t page = runner_->options().page_size;
  const int64_t first = std::max(s.processed - most_behind, s.states_from);
  const int64_t from = (first + page - 1) / page * page;
  if (from >= s.processed) return false;
  s.modules_from = from;
  std::fill(s.predicted.begin(), s.predicted.end(), from);
  runner_->set_first_module_page(s.place, from / page);
  return true;
}

void Drafter::catch_up(std::span<const Behind> sequences) {
  // A pass takes pieces whole, and of one form: which one a token gets depends on its own sequence alone.
  std::vector<Behind> left, later;
  for (int64_t k = 0; k < runner_->modules(); ++k) {
    left.assign(sequences.begin(), sequences.end());
    while (!left.empty()) {
      Runner::Pass pass{k, k};
      std::vector<Row>& rows = pass.rows;
      later.clear();
      for (const Behind& behind : left) {
        Sequence& s = *behind.sequence;
        if (s.lost() || k >= s.depth) continue;
        int64_t& done = s.predicted[static_cast<size_t>(k)];
        // The last position that the main model has run is left for drafting to begin with.
        const int64_t last_run = s.processed == s.length() - 1 ? s.processed - 1 : s.processed;
        const int64_t end = std::min(last_run, s.length() - k - 1);
        if (done >= end) continue;
        const int64_t most = runner_->options().chunk, piece = std::min(end - done, most);
        const Runner::Form its = runner_->form_for(done, piece);
        const int64_t room = most - std::ssize(rows);
        if (rows.empty()) pass.form = its;
        if (its != pass.form || piece > room) {
          later.push_back(behind);
          continue;
        }
        for (int64_t i = done; i < done + piece; ++i) {
          const int32_t state = state_of(s, i, behind.last);
          rows.push_back(
              {s.tokens[static_cast<size_t>(i + k + 1)], static_cast<int32_t>(i), s.place, state, state});
        }
        done += piece;
        if (done < end) later.push_back(behind);
      }
      if (!rows.empty()) runner_->run(pass, Runner::Asked::tokens);
      left.swap(later);
    }
  }
}

// Module j from where it stopped to the last processed position; the last module again one further on its own
// hidden state each time.
Runner::Pass Drafter::pass_of(int64_t j, std::span<Sequence* const> sequences) const {
  const int64_t modules = runner_->modules(), module = std::min(j, modules - 1);
  Runner::Pass pass{module, j < modules ? j : modules};
  for (Sequence* s : sequences) {
    const int64_t last = s->processed - 1 + std::max<int64_t>(j + 1 - modules, 0);
    const int64_t begin = j < modules ? s->predicted[static_cast<size_t>(j)] : last;
    LATENTE_ASSERT(begin <= last);
    for (int64_t position = begin; position <= last; ++position) {
      Row row{.position = static_cast<int32_t>(position), .place = s->place, .write = state_of(*s, position)};
      row.read = j < modules ? row.write : state_of(*s, position - 1);
      const int64_t known = position + module + 1, draft = known - s->length();
      if (draft < 0) {
        row.token = s->tokens[static_cast<size_t>(known)];
      } else {
        row.token = s->drafts[static_cast<size_t>(draft)].token;
        row.follows = s->drafts[static_cast<size_t>(draft)].row;
      }
      if (position == last) row.wanted = true, row.choice = s->choice(s->length() + j);
      pass.rows.push_back(row);
    }
    if (j < modules) s->predicted[static_cast<size_t>(j)] = std::max<int64_t>(s->length() - 1 - j, 0);
  }
  return pass;
}

void Drafter::draft(std::span<Sequence* const> sequences, std::span<const int64_t> wanted,
                    std::vector<Runner::Pass>* chain) {
  for (Sequence* s : sequences) s->drafts.clear();
  const int64_t most = wanted.empty() ? 0 : *std::max_element(wanted.begin(), wanted.end());
  std::vector<Sequence*> drafting;
  int32_t chosen = 0;
  for (int64_t j = 0; j < most; ++j) {
    drafting.clear();
    for (size_t i = 0; i < sequences.size(); ++i) {
      const bool stopped = std::ssize(sequences[i]->drafts) < j;
      if (wanted[i] > j && !stopped) drafting.push_back(sequences[i]);
    }
    if (drafting.empty()) return;
    const Runner::Pass pass = pass_of(j, drafting);
    if (chain) {
      for (Sequence* s : drafting) s->drafts.push_back({0, {}, chosen++});
      chain->push_back(pass);
      continue;
    }
    Outcome outcome = runner_->run(
        pass, latente::chosen_by_passes(drafting) ? Runner::Asked::tokens : Runner::Asked::logits);
    for (Sequence* s : drafting) {
      if (j == 0) s->draft_from_here();
      const Outcome row = outcome.take(1);
      try {
        draw(*s, row);
      } catch (...) {
        s->fail_with_current();
      }
    }
  }
}

// The next draft of a sequence, or none where its constraint cannot follow.
void Drafter::draw(Sequence& s, Outcome row) {
  if (s.chosen_by_passes()) {
    s.drafts.push_back({row.chosen.front(), distribution_of(row.chosen.front())});
    return;
  }
  sequence_ = s.tokens;
  for (const Sequence::Draft& draft : s.drafts) sequence_.push_back(draft.token);
  std::span<const uint64_t> admitted;
  try {
    admitted = admitted_by(s.ahead.get());
  } catch (const Error&) {
    return;
  }
  Distribution distribution = distribution_of(row.logits, {sequence_, static_cast<size_t>(s.prompt)},
                                              s.request.options.sampling, admitted);
  const int32_t token = s.draw(distribution, s.length() + static_cast<int64_t>(s.drafts.size()));
  if (!s.may_draft(token)) return;
  // Drafts behind an end will not be looked at.
  if (s.ahead && s.ahead->finished()) s.ahead.reset();
  s.drafts.push_back({token, std::move(distribution)});
}

std::vector<int32_t> Drafter::look_up(std::span<const int32_t> tokens, int64_t most) {
  const int64_t length = static_cast<int64_t>(tokens.size());
  int64_t best = -1, agreement = shortest - 1;
  for (int64_t end = length - 1; end >= shortest && agreement < longest; --end) {
    // tokens[end - n, end) against the last n.
    int64_t n = 0;
    while (n < longest && n < end &&
           tokens[static_cast<size_t>(end - 1 - n)] == tokens[static_cast<size_t>(length - 1 - n)])
      ++n;
    if (n > agreement) agreement = n, best = end;
  }
  if (best < 0) return {};
  const auto found =
      tokens.subspan(static_cast<size_t>(best), static_cast<size_t>(std::min(most, length - best)));
  return {found.begin(), found.end()};
}

}  // namespace latente

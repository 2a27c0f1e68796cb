#include "infer/engine.h"

#include <algorithm>

namespace latente {
namespace {

constexpr int64_t longest_reported = 64;  // piece of a prompt: rows of logits kept at a time

RunnerOptions with_states(RunnerOptions options, const Transformer& model) {
  options.states = model.mtp.empty() ? 0 : Drafter::states_for(options.sequences, options.chunk);
  return options;
}

// Whether one of `running` is about to read, and then remember, pages that `s` begins with, too: waiting for
// them costs less than reading them twice.
bool is_being_read(const Sequence& s, std::span<const std::unique_ptr<Sequence>> running, PagePool& pool) {
  if (s.reports_prompt()) return false;
  for (const auto& other : running) {
    if (!other->reading()) continue;
    const int64_t most = std::min(s.length() - 1, other->unread);
    const auto differ = std::mismatch(s.tokens.begin(), s.tokens.begin() + most, other->tokens.begin());
    const int64_t shared = (differ.first - s.tokens.begin()) / pool.page_size() * pool.page_size();
    if (shared > other->remembered && shared > pool.match(s.tokens, 0).positions) return true;
  }
  return false;
}

}  // namespace

Engine::Engine(Backend& backend, const Transformer& model, const RunnerOptions& options)
    : config_(&model.config()),
      chains_(!backend.is_host()),
      runner_(backend, model, with_states(options, model)),
      drafter_(runner_),
      pool_(runner_.pages(), options.page_size, runner_.modules()) {
  for (int64_t place = options.sequences; place-- > 0;) free_places_.push_back(static_cast<int32_t>(place));
}

void Engine::check(const Request& request) const {
  const GenerationOptions& options = request.options;
  options.sampling.validate();
  const int64_t length = static_cast<int64_t>(request.prompt.size());
  const int64_t room = std::min(runner_.options().context, pool_.pages() * pool_.page_size());
  if (length == 0) fail("the prompt is empty");
  if (length >= room) fail("the prompt has {} tokens, the context holds {}", length, room);
  for (int32_t id : request.prompt) {
    if (id < 0 || id >= config_->vocab_size)
      fail("token {} lies outside the vocabulary of {}", id, config_->vocab_size);
  }
  for (const auto& [id, bias] : options.sampling.logit_bias) {
    if (id >= config_->vocab_size)
      fail("logit_bias: token {} lies outside the vocabulary of {}", id, config_->vocab_size);
  }
  if (options.top_logprobs < -1 || options.top_logprobs > config_->vocab_size)
    fail("top_logprobs: expected -1 to {}, found {}", config_->vocab_size, options.top_logprobs);
  if (options.max_tokens < 0) fail("max_tokens: expected 0 or more, found {}", options.max_tokens);
  if (options.draft < -1 || options.draft > most_drafts)
    fail("draft: expected 0 to {} tokens, or -1, found {}", most_drafts, options.draft);
}

uint64_t Engine::submit(Request request) {
  check(request);
  auto s = std::make_unique<Sequence>();
  const GenerationOptions& options = request.options;
  s->id = next_id_++;
  s->random = Random(options.sampling.seed);
  s->tokens = request.prompt;
  s->prompt = s->unread = s->length();
  s->stats.prompt_tokens = s->prompt;
  s->depth = runner_.modules() == 0 ? 0 : options.draft < 0 ? runner_.modules() : options.draft;
  s->adaptive = options.draft < 0;
  s->by_position = options.repeatable;
  s->predicted.assign(static_cast<size_t>(runner_.modules()), 0);
  if (options.constraint) s->constraint = options.constraint->fork();
  s->submitted = Sequence::Clock::now();
  s->request = std::move(request);
  waiting_.push_back(std::move(s));
  return waiting_.back()->id;
}

Sequence* Engine::find(uint64_t id) {
  for (const Pointer& s : waiting_) {
    if (s->id == id) return s.get();
  }
  for (const Pointer& s : running_) {
    if (s->id == id) return s.get();
  }
  return nullptr;
}

void Engine::cancel(uint64_t id) {
  if (Sequence* s = find(id)) s->cancelled = true;
}

void Engine::interrupt(uint64_t id) {
  if (Sequence* s = find(id)) s->interrupted = true;
}

// -- Places and pages

// What was run is kept for later sequences.
void Engine::leave(Sequence& s) {
  if (keeps_up(s, running_.size())) drafter_.catch_up(s);
  remember(s, s.processed);
  for (int32_t page : s.pages) pool_.release(page);
  s.pages.clear();
  free_places_.push_back(s.place);
  s.place = -1;
}

// Of the tokens the main model has run, for later sequences.
void Engine::remember(Sequence& s, int64_t tokens) {
  if (tokens <= s.remembered) return;
  // The modules stop a little before the end; whoever continues from here runs those positions again.
  int64_t modules = 0;
  for (int64_t k = 0; s.modules_from == 0 && k < std::min(runner_.modules(), s.depth); ++k) {
    if (s.predicted[static_cast<size_t>(k)] + k + 1 < tokens) break;
    ++modules;
  }
  pool_.remember(std::span(s.tokens).first(static_cast<size_t>(tokens)), s.pages, modules);
  s.remembered = tokens;
}

// What was cancelled or interrupted, and what asks for nothing.
void Engine::drop() {
  for (const Pointer& s : waiting_) {
    const bool complete = s->constraint && s->constraint->finished();
    const bool asks = s->writes() || s->reports_prompt();
    if (s->cancelled || (asks && !complete && !s->interrupted)) continue;
    if (complete) s->stats.finish = Finish::complete;
    if (s->interrupted) s->stats.finish = Finish::interrupted;
    s->cancelled = true;
    if (s->request.on_finish) s->request.on_finish(s->stats);
  }
  std::erase_if(waiting_, [](const Pointer& s) { return s->cancelled; });
  for (const Pointer& s : running_) {
    if (s->cancelled) {
      leave(*s);
      s->finished = true;
    } else if (s->interrupted) {
      s->stats.finish = Finish::interrupted;
      finish(*s);
    }
  }
  std::erase_if(running_, [](const Pointer& s) { return s->finished; });
}

bool Engine::start(Sequence& s) {
  const int64_t page_size = pool_.page_size();
  const int64_t modules = std::min(s.depth, runner_.modules());
  PagePool::Match match = pool_.match(s.tokens, modules);
  bool lost = false;
  if (s.adaptive && modules > 0) {
    PagePool::Match without = pool_.match(s.tokens, 0);
    // The modules' own entries end a few tokens before the main model's.
    lost = std::min(without.positions, s.length() - 1) > match.positions + modules;
    if (lost) match = std::move(without);
  }
  const bool reports = s.reports_prompt() && s.reported < s.prompt;
  const int64_t reuse = reports ? 0 : std::min(match.positions, s.length() - 1);
  const size_t shared = static_cast<size_t>(reuse / page_size);
  const bool copies = reuse % page_size != 0;
  const int32_t source = !copies ? -1 : shared < match.pages.size() ? match.pages[shared] : match.partial;
  match.pages.resize(shared);
  for (int32_t page : match.pages) pool_.hold(page);
  if (copies) pool_.hold(source);
  auto give_back = [&] {
    for (int32_t page : match.pages) pool_.release(page);
    if (copies) pool_.release(source);
  };
  // A page more for everybody who runs, lest they drive each other out at once.
  const int64_t needed = s.length() / page_size + 1 - static_cast<int64_t>(shared);
  if (!running_.empty() && pool_.available() < needed + static_cast<int64_t>(running_.size())) {
    give_back();
    return false;
  }
  s.place = free_places_.back();
  free_places_.pop_back();
  s.pages = std::move(match.pages);
  if (copies) {
    if (std::optional<int32_t> page = pool_.take()) {
      runner_.copy_page(source, *page);
      s.pages.push_back(*page);
    }
    pool_.release(source);
  }
  s.processed = std::min(reuse, static_cast<int64_t>(s.pages.size()) * page_size);
  s.remembered = s.processed;
  std::fill(s.predicted.begin(), s.predicted.end(), s.processed);
  s.states_from = s.processed;
  s.modules_from = lost ? -1 : 0;
  if (runner_.modules() > 0) runner_.set_first_module_page(s.place, 0);
  for (size_t i = 0; i < s.pages.size(); ++i) runner_.set_page(s.place, static_cast<int64_t>(i), s.pages[i]);
  if (s.stats.generated_tokens == 0) {
    s.stats.reused_tokens = s.processed;
    s.started = Sequence::Clock::now();
    s.stats.waiting_seconds = Sequence::seconds_between(s.submitted, s.started);
  }
  if (running_.empty()) {
    const bool chosen = s.chosen_by_passes();
    runner_.prepare(s.depth, chosen ? Runner::Asked::tokens : Runner::Asked::logits, chosen && chains_);
  }
  return true;
}

void Engine::admit() {
  while (!waiting_.empty() && !free_places_.empty()) {
    auto rank = [](const Pointer& s) { return s->request.priority + s->passed_over / patience; };
    auto next = waiting_.end();
    for (auto at = waiting_.begin(); at != waiting_.end(); ++at) {
      if (next != waiting_.end() && rank(*at) <= rank(*next)) continue;
      if (!is_being_read(**at, running_, pool_)) next = at;
    }
    if (next == waiting_.end() || !start(**next)) return;
    for (auto at = waiting_.begin(); at != next; ++at) ++(*at)->passed_over;
    running_.push_back(std::move(*next));
    waiting_.erase(next);
  }
}

// The pages go, the tokens stay: it will read them again.
void Engine::preempt(Sequence& s) {
  leave(s);
  s.drafts.clear();
  s.unread = s.stats.generated_tokens > 0 ? s.length() - 1 : s.prompt;
  s.processed = s.remembered = 0;
  const auto at =
      std::find_if(running_.begin(), running_.end(), [&](const Pointer& p) { return p.get() == &s; });
  waiting_.push_front(std::move(*at));
  running_.erase(at);
}

bool Engine::cover(Sequence& s, int64_t end) {
  while (static_cast<int64_t>(s.pages.size()) * pool_.page_size() < end) {
    if (std::optional<int32_t> page = pool_.take()) {
      runner_.set_page(s.place, static_cast<int64_t>(s.pages.size()), *page);
      s.pages.push_back(*page);
      continue;
    }
    // The last to come among the least urgent goes.
    Sequence* victim = &s;
    for (const Pointer& other : running_) {
      const int theirs = other->request.priority, least = victim->request.priority;
      if (theirs < least || (theirs == least && other->id > victim->id)) victim = other.get();
    }
    preempt(*victim);
    if (victim == &s) return false;
  }
  return true;
}

// -- A step

bool chosen_by_passes(std::span<Sequence* const> sequences) {
  return std::all_of(sequences.begin(), sequences.end(), [](Sequence* s) { return s->chosen_by_passes(); });
}

bool Engine::step() {
  drop();
  admit();
  read();
  write();
  std::erase_if(running_, [](const Pointer& s) { return s->finished; });
  return !running_.empty() || !waiting_.empty();
}

// A pass over a piece of what the most urgent sequence has to read, and pieces of others if they fit. What
// was written before a preemption is computed as it was then, so that the text goes on the same.
void Engine::read() {
  struct Piece {
    Sequence* sequence;
    Stretch stretch;
    bool samples, reports;
  };
  std::vector<Sequence*> readers;
  for (const Pointer& s : running_) {
    if (s->reading()) readers.push_back(s.get());
  }
  std::stable_sort(readers.begin(), readers.end(), [](const Sequence* a, const Sequence* b) {
    return a->request.priority > b->request.priority;
  });
  std::vector<Piece> pieces;
  Runner::Pass pass;
  std::vector<Row>& rows = pass.rows;
  for (Sequence* s : readers) {
    if (s->place < 0) continue;  // driven out by one before
    const int64_t first = s->processed, room = runner_.options().chunk - static_cast<int64_t>(rows.size());
    const int64_t end = first < s->prompt ? std::min(s->prompt, s->unread) : s->unread;
    const bool reports = s->reports_prompt() && first < s->prompt;
    // Pieces end where they do when nothing is reused, and who shares less than a page reads on in the form
    // in which the whole would be read, so that such a prompt gives the same bits whatever the cache held.
    const int64_t chunk = runner_.options().chunk, piece = (first / chunk + 1) * chunk - first;
    const int64_t count = std::min({end - first, piece, reports ? longest_reported : chunk});
    const int64_t from = first < pool_.page_size() ? 0 : first;
    const Runner::Form its =
        first < s->prompt ? runner_.form_for(from, first + count - from) : Runner::Form::absorbed;
    if (!pieces.empty() && (count > room || its != pass.form)) continue;
    if (!cover(*s, first + count)) continue;
    pass.form = its;
    const bool samples = first + count == s->unread && s->stats.generated_tokens == 0;
    pieces.push_back({s, {first, count, static_cast<int64_t>(rows.size())}, samples, reports});
    for (int64_t i = first; i < first + count; ++i) {
      const int32_t state = runner_.modules() > 0 ? drafter_.state_of(*s, i, pieces.back().stretch) : -1;
      rows.push_back({s->tokens[static_cast<size_t>(i)], static_cast<int32_t>(i), s->place, 0, state,
                      reports || (samples && i + 1 == first + count)});
      if (rows.back().wanted) rows.back().choice = s->choice(i + 1);
    }
  }
  // Later ones may have driven out earlier ones: then all is tried anew in the next step.
  if (std::any_of(pieces.begin(), pieces.end(), [](const Piece& p) { return p.sequence->place < 0; })) return;
  if (rows.empty()) return;

  std::vector<Sequence*> theirs;
  for (const Piece& piece : pieces) theirs.push_back(piece.sequence);
  const bool reports = std::any_of(pieces.begin(), pieces.end(), [](const Piece& p) { return p.reports; });
  const bool logits = reports || !chosen_by_passes(theirs);
  Outcome outcome = runner_.run(pass, logits ? Runner::Asked::logits : Runner::Asked::tokens);
  std::vector<Next> next;
  for (const Piece& piece : pieces) {
    Sequence& s = *piece.sequence;
    const int64_t first = s.processed;
    s.processed += piece.stretch.count;
    next.emplace_back();
    const int64_t wanted = piece.reports ? piece.stretch.count : piece.samples ? 1 : 0;
    Outcome its = outcome.take(wanted);
    try {
      Outcome last;
      for (int64_t i = 0; i < wanted; ++i) {
        last = its.take(1);
        if (piece.reports) report_prompt(s, first + i, last.logits);
      }
      if (piece.samples && s.writes()) next.back() = next_of(s, last);
    } catch (...) {
      s.fail_with_current();
    }
  }
  std::vector<Drafter::Behind> behind;
  for (const Piece& piece : pieces) {
    if (keeps_up(*piece.sequence, running_.size())) {
      behind.push_back({piece.sequence, piece.stretch});
    } else {
      drafter_.let_lie(*piece.sequence);
    }
  }
  drafter_.catch_up(behind);
  for (size_t i = 0; i < pieces.size(); ++i) {
    Sequence& s = *pieces[i].sequence;
    remember(s, s.processed / pool_.page_size() * pool_.page_size());
    if (s.ended || (pieces[i].samples && !s.writes())) finish(s);
    if (s.finished || !pieces[i].samples) continue;
    s.first_token = Sequence::Clock::now();
    s.stats.prompt_seconds = Sequence::seconds_between(s.started, s.first_token);
    try {
      s.ended = !emit(s, s.draw(next[i].distribution, s.length()), false, next[i]);
    } catch (...) {
      s.fail_with_current();
    }
    if (s.ended) finish(s);
  }
}

// The logits at `position` say how likely the token behind it was.
void Engine::report_prompt(Sequence& s, int64_t position, std::span<const float> logits) {
  if (position + 1 != s.reported || s.reported >= s.prompt) return;
  const int32_t token = s.tokens[static_cast<size_t>(s.reported++)];
  if (s.request.on_prompt_token)
    s.request.on_prompt_token(logprobs_of(logits, token, s.request.options.top_logprobs));
}

std::vector<Engine::SequenceFigures> Engine::sequences() const {
  std::vector<SequenceFigures> all;
  const auto add = [&](const Sequence& s, bool running) {
    all.push_back(
        {s.id, running, s.prompt, s.processed, s.stats.generated_tokens, s.stats.drafted, s.stats.accepted});
  };
  for (const Pointer& s : running_) add(*s, true);
  for (const Pointer& s : waiting_) add(*s, false);
  return all;
}

void Engine::finish(Sequence& s) {
  if (s.stats.generated_tokens > 0)
    s.stats.decode_seconds = Sequence::seconds_between(s.first_token, Sequence::Clock::now());
  s.finished = true;
  leave(s);
  if (s.request.on_finish) s.request.on_finish(s.stats);
}

GenerationStats Engine::generate(std::span<const int32_t> prompt, const GenerationOptions& options,
                                 const std::function<bool(GeneratedToken)>& on_token,
                                 const std::function<bool()>& go_on) {
  GenerationStats stats;
  bool finished = false;
  Request request;
  request.prompt.assign(prompt.begin(), prompt.end());
  request.options = options;
  request.on_token = on_token;
  request.on_finish = [&](const GenerationStats& result) { stats = result, finished = true; };
  if (options.max_tokens == 0) {
    check(request);
    stats.prompt_tokens = static_cast<int64_t>(prompt.size());
    return stats;
  }
  const uint64_t id = submit(std::move(request));
  try {
    while (!finished) {
      if (go_on && !go_on()) interrupt(id);
      step();
    }
  } catch (...) {
    cancel(id);  // it must not call back into this frame
    throw;
  }
  if (stats.error) std::rethrow_exception(stats.error);
  return stats;
}

}  // namespace latente

// Engine: token ids in, token ids out, for many sequences at once (continuous batching: Yu et al. 2022). Each
// step reads a piece of one prompt and then writes on in all sequences whose prompts are read, with
// speculation by the MTP modules (DeepSeek-V3 report, section 2.2). It knows no text. A sequence's tokens do
// not depend on what runs beside it. Not for several threads at once.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <string>

#include "infer/draft_length.h"
#include "infer/drafter.h"
#include "infer/pages.h"
#include "infer/runner.h"
#include "infer/sequence.h"

namespace latente {

class Engine {
 public:
  // options.states is the engine's own affair.
  Engine(Backend& backend, const Transformer& model, const RunnerOptions& options = {});
  // Whether drafts and the pass that verifies them, or a few passes without drafts, are one chain
  // (Runner::run) where no logits are needed: what a device does then does not wait for the host. By default
  // where the device is not the host, which would only record more plans for it. The tokens are the same.
  // Passes without drafts are as many as take no longer than `seconds`, which nobody should notice who waits
  // for a token.
  void chain_passes(bool chained, double seconds = unnoticed) { chains_ = chained, chain_seconds_ = seconds; }
  static constexpr double unnoticed = 3e-3;
  // Several sequences decode for so many seconds, and for each 16 of them as long, before drafts are tried:
  // what a trial costs whatever comes of it is 3 % of that.
  void try_drafts_after(double seconds) { first_trial_ = seconds; }

  // Queues a sequence; it begins when there is a place and there are pages for it. Higher priorities begin
  // first, but whoever is passed over by `patience` others rises by one. What the cache holds of the prompt
  // is reused. Errors: empty prompt, prompt beyond the context or the cache, ids out of range, senseless
  // options.
  uint64_t submit(Request request);
  // Ends a sequence before the next step; unknown ids are ignored.
  void cancel(uint64_t id);
  // The same, and on_finish is called, as if its on_token had returned false.
  void interrupt(uint64_t id);
  // Returns whether there is more to do. An error that belongs to one sequence (logits that are NaN, a
  // constraint that cannot go on, its on_token) ends that one (Finish::failed), not the others.
  bool step();

  // Submits one sequence and steps until it ends, whatever else runs. `on_token` as in Request; `go_on` is
  // asked before each step, so also between the pieces of a long prompt; what ends it with an error is
  // thrown.
  GenerationStats generate(std::span<const int32_t> prompt, const GenerationOptions& options,
                           const std::function<bool(GeneratedToken)>& on_token,
                           const std::function<bool()>& go_on = {});

  // Those that run or wait.
  struct SequenceFigures {
    uint64_t id;
    bool running;
    int64_t prompt_tokens, processed, generated_tokens, drafted, accepted;
  };
  std::vector<SequenceFigures> sequences() const;

  // Saves what the cache holds of the sequence that begins with `tokens`, whole or not at all, and returns
  // how many positions that is. Loading it makes them known again; `notes` are the caller's own. Errors of
  // loading: no such file, cut short, of another model or way to store entries, more tokens than the cache
  // has room for.
  int64_t save(const std::string& path, std::span<const int32_t> tokens,
               const std::map<std::string, std::string>& notes = {});
  int64_t load(const std::string& path, std::map<std::string, std::string>* notes = nullptr);

  size_t running() const { return running_.size(); }
  size_t waiting() const { return waiting_.size(); }
  const Runner& runner() const { return runner_; }
  const std::vector<Runner::ExpertLoad>& expert_loads() { return runner_.expert_loads(); }
  const PagePool& pages() const { return pool_; }

  static constexpr int64_t patience = 16;

 private:
  using Pointer = std::unique_ptr<Sequence>;
  static constexpr int64_t most_drafts = 7;  // of a sequence in a pass
  void check(const Request& request) const;
  std::string fingerprint();

  void drop();
  void admit();
  bool start(Sequence& sequence);
  // Pages for positions up to `end`, taken from others if they must be. False: the sequence itself had to go.
  bool cover(Sequence& sequence, int64_t end);
  void preempt(Sequence& sequence);
  void leave(Sequence& sequence);
  void remember(Sequence& sequence, int64_t tokens);

  void read();
  void write();
  std::vector<Sequence*> writers();
  void learn(std::span<Sequence* const> sequences, std::span<const int64_t> right, double seconds,
             bool unusual);
  // Whether modules had much to make up for.
  bool propose(std::span<Sequence* const> sequences, std::vector<Runner::Pass>* chain);
  Runner::Pass next_pass(std::span<Sequence* const> sequences);
  Runner::Pass following(const Runner::Pass& last, std::span<Sequence* const> sequences);
  int64_t passes_at_once(std::span<Sequence* const> sequences);
  int64_t room_of(const Sequence& sequence) const;
  static void settle(Sequence& sequence, const Outcome& drafts);
  // What one sequence makes of its rows. Returns how many drafts were right.
  int64_t conclude(Sequence& sequence, Outcome rows);
  // The distribution of what comes next, and the logits themselves if they are to be reported.
  struct Next {
    Distribution distribution;
    std::vector<float> logits;
  };
  static Next next_of(Sequence& sequence, Outcome row);
  bool emit(Sequence& sequence, int32_t token, bool drafted, const Next& next);
  static void report_prompt(Sequence& sequence, int64_t position, std::span<const float> logits);
  Sequence* find(uint64_t id);
  void finish(Sequence& sequence);

  const Config* config_;
  bool chains_;
  double chain_seconds_ = unnoticed;
  double first_trial_ = 0.2;
  Runner runner_;
  Drafter drafter_;
  PagePool pool_;
  std::deque<Pointer> waiting_;
  std::vector<Pointer> running_;
  std::vector<int32_t> free_places_;
  uint64_t next_id_ = 1;
  size_t turn_ = 0;  // where the next decoding pass begins when not all fit

  // How many drafts pay, by how many sequences share a pass, and the seconds of one without any, smoothed.
  struct Lengths {
    DraftLength modules, looked_up;
    double plain_pass = 0;
  };
  Lengths& lengths_for(size_t sequences);
  // Whether the modules shall keep up with a sequence while so many run.
  bool keeps_up(const Sequence& sequence, size_t sequences);
  std::map<int64_t, Lengths> lengths_;
};

}  // namespace latente

// Runner: forward passes over tokens of any sequences, on a paged latent cache. It keeps a plan per shape,
// all in one arena, and knows nothing of schedules, or of who holds which page. Positions are
// absolute; running a position again overwrites its entries, so rejected drafts need no undoing. A row's
// result does not depend on the other rows of its pass.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "model/transformer.h"
#include "tensor/choice.h"

namespace latente {

struct RunnerOptions {
  int64_t context = 4096;  // tokens a sequence can hold
  int64_t page_size = 64;
  int64_t chunk = 512;  // longest piece of a prompt in one pass
  // f32, bf16, or for MLA u8 (int8) and f8e4m3 (Backend::narrow_entry_bytes); float64 models keep float64.
  DType cache_type = DType::f32;
  int64_t sequences = 1;    // that can run at a time: places
  int64_t pages = 0;        // of the cache; 0 = what all sequences can hold,
  int64_t cache_bytes = 0;  // or, if that is not 0, as many as fit here: an Error if one sequence does not
  // Hidden states kept for the MTP modules. Callers number them; 0 = none.
  int64_t states = 0;
  bool count_experts = false;  // Runner::expert_loads; two such runners of one model would share their counts
};

// A token of a pass.
struct Row {
  int32_t token = 0;
  int32_t position = 0;
  int32_t place = 0;    // of its sequence
  int32_t read = 0;     // modules: the hidden state that is read, of the pass's level
  int32_t write = -1;   // where its own hidden state is left, one level up; -1 = nowhere
  bool wanted = false;  // what comes next is
  Choice choice{};      // how it is chosen
  // In a chain: the token is what this wanted row of the passes before chose; -1 = `token`.
  int32_t follows = -1;
};

// What passes say of their wanted rows, in order, valid until the next ones: the tokens that were chosen, or
// Backend::not_a_number or not_finite, and if they were asked for the logits [rows, vocabulary].
struct Outcome {
  std::span<const int32_t> chosen;
  std::span<float> logits;
  int64_t vocabulary = 0;
  bool new_plan = false;  // its first runs take longer

  // The first rows, which are then no longer part of this.
  Outcome take(int64_t rows);
};

// f32, bf16, int8 or fp8, or auto: f32 on the CPU, elsewhere the type of the model's activations. Error
// otherwise.
DType cache_type_from_name(std::string_view name, const Backend& backend, const Transformer& model);

class Runner {
 public:
  Runner(Backend& backend, const Transformer& model, const RunnerOptions& options);

  // Entry `index` of a sequence's block table: the page of positions index · page_size and on.
  void set_page(int64_t place, int64_t index, int32_t page);
  void copy_page(int32_t from, int32_t to);
  // MTP modules attend to what lies from this entry of the sequence's block table on: from position index ·
  // page_size.
  void set_first_module_page(int64_t place, int64_t index);

  // How a pass attends. absorbed: over the latents as they lie. expanded: MLA's keys and values are computed
  // from the latents first, which costs less for many tokens of one sequence. The forms differ in rounding.
  enum class Form : uint8_t { absorbed, expanded };

  // The main model or an MTP module over some rows; rows of one sequence lie side by side. What comes before
  // a row's position in its sequence must have been run, or be in the same pass.
  struct Pass {
    int64_t module = -1;  // -1 = the main model, which leaves hidden states at level 0
    // Modules: a row's token is the one module + 1 places after its position. Reads hidden states of `level`
    // (that of module k is k; the last module reads its own, level k + 1, beyond the number of modules) and
    // leaves its own at level k + 1.
    int64_t level = 0;
    Form form = Form::absorbed;
    std::vector<Row> rows{};
  };

  // What is asked of wanted rows beside the tokens that are chosen.
  enum class Asked : uint8_t { tokens, logits };

  // For `count` new tokens of a sequence after `first`: expanded where that saves more than a fiftieth of the
  // pass.
  Form form_for(int64_t first, int64_t count) const;

  Outcome run(const Pass& pass, Asked asked) { return run(std::span(&pass, 1), asked); }
  // A chain of passes without the host between them: one plan, and on a GPU one graph. Rows may follow what
  // passes before have chosen. Logits are there for a single pass alone.
  Outcome run(std::span<const Pass> chain, Asked asked);

  // How many tokens each routed expert was chosen for so far, by MoE layer, those of MTP modules last; empty
  // unless options.count_experts. The device counts as it routes; this call fetches what came since the last
  // one. To be called before one expert has 2^24 tokens more.
  struct ExpertLoad {
    int64_t layer;  // num_hidden_layers and on: modules
    std::vector<int64_t> tokens;
  };
  const std::vector<ExpertLoad>& expert_loads();

  // From now on passes add the time of each op to `seconds` (Plan::run_profiled); null = no more.
  void profile_into(std::map<std::string, double>* seconds) { seconds_ = seconds; }

  const Transformer& model() const { return *model_; }
  Backend& backend() { return *backend_; }
  const std::vector<LayerCache>& caches() const { return caches_; }
  const RunnerOptions& options() const { return options_; }
  int64_t pages() const { return options_.pages; }
  int64_t modules() const { return static_cast<int64_t>(model_->mtp.size()); }
  const Config& config() const { return model_->config(); }
  // Records ahead of time what decoding one sequence with up to `drafts` tokens a pass runs, a draft in a
  // pass of its own or all in a chain.
  void prepare(int64_t drafts, Asked asked, bool chained);
  // Plans kept, of passes of some shape; of more than there may be, the one not used for longest goes.
  static constexpr size_t most_plans = 256;
  size_t plans() const { return plans_.size(); }
  int64_t recorded() const { return recorded_; }                   // plans, so far
  double recording_seconds() const { return recording_seconds_; }  // spent on plans so far
  int64_t cache_bytes_per_token() const;
  // Arena, caches (as if all pages were in use) and hidden states; weights are the model's.
  int64_t memory_bytes() const;

 private:
  struct Shape {
    int64_t module, level;
    int64_t tokens, wanted;
    Form form;
    bool follows;   // some row does
    int64_t pages;  // that block tables name
    auto operator<=>(const Shape&) const = default;
  };
  struct Key {
    std::vector<Shape> passes;
    Asked asked;
    auto operator<=>(const Key&) const = default;
  };
  // What a pass is told of its rows. last: the last entry that a row attends to; slots: where its own goes.
  struct Field {
    enum Name : int64_t { ids, positions, last, slots, places, reads, writes, follows, count };
  };
  // i32 of a pass's inputs: the fields, [tokens] each, then which rows are wanted, then their choices.
  static int64_t inputs_of(const Shape& shape) {
    return Field::count * shape.tokens + (1 + Choice::words) * shape.wanted;
  }
  struct Recorded {
    std::unique_ptr<Plan> plan;
    Tensor inputs;              // i32: of all passes
    std::vector<Tensor> masks;  // a pass, [tokens]: 0 = padding; null where nobody counts, or there is none
    Tensor chosen;              // i32: of all passes
    Tensor logits;              // if they are asked for
    int64_t runs = 0;
    uint64_t used = 0;  // when, by clock_
  };
  Shape shape_of(const Pass& pass, bool chained) const;
  int32_t last_entry(const Pass& pass, const Row& row) const;
  // Pages that block tables should name for so many rows that attend to no more than `entries` entries.
  int64_t table_pages(int64_t rows, Form form, int64_t entries) const;
  Recorded& recorded(const Key& key);
  void record(const Shape& shape, Asked asked, bool chained, const Tensor& inputs, int64_t first_chosen,
              Recorded& record);
  // chosen_at: where in Recorded::chosen the wanted rows of the passes before are.
  void fill(const Pass& pass, const Shape& shape, std::span<const int32_t> chosen_at, int32_t* inputs) const;
  int32_t slot_of(const Row& row) const;
  void prepare(int64_t drafts, Asked asked, bool chained, int64_t entries);
  void count_experts();

  Backend* backend_;
  const Transformer* model_;
  RunnerOptions options_;
  int64_t pages_a_sequence_;
  double multiply_adds_;  // of a token without attention
  Tensor rope_table_, block_table_;
  Tensor module_table_;            // the same from first_module_page_ on
  std::vector<int32_t> pages_of_;  // the block table, on the host
  std::vector<int32_t> first_module_page_;
  std::vector<LayerCache> caches_;
  std::vector<Tensor> states_;  // by level: [states, hidden]
  std::vector<Tensor> loads_;   // on the device, f32, as expert_loads_ has them
  std::vector<ExpertLoad> expert_loads_;
  std::map<Key, Recorded> plans_;
  uint64_t clock_ = 0;
  int64_t recorded_ = 0;
  double recording_seconds_ = 0;
  std::shared_ptr<void> arena_;
  int64_t arena_bytes_ = 0;
  std::map<std::string, double>* seconds_ = nullptr;
  std::vector<int32_t> values_;
  std::vector<float> logits_;
  std::vector<int32_t> chosen_, chosen_at_;
  std::vector<double> wide_logits_;
};

}  // namespace latente

// Everything `latente train CONFIG.toml` can be told, with the defaults published for DeepSeek-V3 where there
// are any (report, section 4.2).
#pragma once

#include "base/fields.h"
#include "train/corpus.h"
#include "train/optimizer.h"
#include "train/schedule.h"

namespace latente {

struct ModelOptions {
  std::string config;         // config.json of a new model, or
  std::string from;           // a Hugging Face directory whose weights are trained on
  std::string tokenizer;      // a directory, tokenizer.json or tiktoken.model; default: that of `from`
  std::string dtype = "f32";  // of the weights: f32, or bf16 with float32 masters in the optimizer
  bool fp8 = false;           // linear layers and experts multiply in FP8 (e4m3): needs bf16 and a Hopper GPU
  int64_t seed = 1;           // of the initial weights
  FIELDS(config, from, tokenizer, dtype, fp8, seed)
};

struct BatchSizeOptions {
  int64_t tokens = 65536;      // a step, all micro-batches together
  int64_t length = 1024;       // tokens a sequence
  int64_t sequences = 0;       // a micro-batch; 0 = as many as memory allows, up to 16384 tokens
  bool document_mask = false;  // attention stays inside a document; false: as DeepSeek-V3 was pretrained
  int64_t seed = 1;            // of the order of the windows
  double fim_rate = 0;  // share of documents turned into prefix-suffix-middle; needs the next three tokens
  std::string fim_begin = "<｜fim▁begin｜>", fim_hole = "<｜fim▁hole｜>", fim_end = "<｜fim▁end｜>";
  FIELDS(tokens, length, sequences, document_mask, seed, fim_rate, fim_begin, fim_hole, fim_end)
};

// Weight of the MTP loss (report, section 4.2): 0.3 for the first 10 of 14.8T tokens, then 0.1.
struct MtpOptions {
  double lambda = 0.3, lambda_after = 0.1;
  double change_at = 10.0 / 14.8;  // share of the steps
  FIELDS(lambda, lambda_after, change_at)
};

// Load balance (report, sections 2.1.2 and 4.2; for V2's auxiliary losses DeepSeek-V2, section 2.2.3).
struct BalanceOptions {
  double bias_rate = 0.001;         // speed of the routing bias; 0 turns auxiliary-loss-free balancing off
  double bias_until = 14.3 / 14.8;  // share of the steps, then it stands still
  double sequence_alpha = 1e-4;     // of the complementary sequence-wise loss
  double expert_alpha =
      0;  // V2's expert-level loss over all tokens of a micro-batch, instead of sequence-wise
  double device_alpha = 0, communication_alpha = 0;  // V2's device-level and communication losses
  int64_t devices = 1;                               // equal parts of the experts, which these two speak of
  int64_t devices_per_token = 1;                     // how many a token is sent to at most (V2: 3 of 8)
  FIELDS(bias_rate, bias_until, sequence_alpha, expert_alpha, device_alpha, communication_alpha, devices,
         devices_per_token)
};

struct ValidationOptions {
  int64_t every = 200;   // steps; 0 = only at the end
  int64_t batches = 16;  // micro-batches a validation; 0 = the whole set
  FIELDS(every, batches)
};

struct SampleOptions {
  int64_t every = 0;                 // steps; 0 = never
  std::vector<std::string> prompts;  // none: from the beginning of a text
  int64_t tokens = 48;
  double temperature = 0.8;
  int64_t top_k = 0;
  FIELDS(every, prompts, tokens, temperature, top_k)
};

struct SaveOptionsOfRun {
  int64_t every = 500;  // steps; 0 = only at the end
  int64_t keep = 2;     // states kept
  FIELDS(every, keep)
};

struct LogOptions {
  int64_t every = 1;  // steps a record
  bool tensorboard = true;
  double peak_gflops = 0;  // of the machine, for the share of peak; 0 = measured at the start
  FIELDS(every, tensorboard, peak_gflops)
};

struct TrainOptions {
  std::string out;             // the run's directory: metrics, states, the finished model
  int64_t steps = 0;           // optimizer steps, or
  int64_t tokens = 0;          // tokens to train on
  std::string device = "cpu";  // cpu, cuda, cuda:N, auto
  int threads = 0;             // 0 = all cores
  double memory = 0;           // GiB of the device that the run may take; 0 = what is available
  ModelOptions model;
  CorpusOptions data;
  BatchSizeOptions batch;
  ScheduleOptions schedule;
  OptimizerOptions optimizer;
  MtpOptions mtp;
  BalanceOptions balance;
  ValidationOptions validation;
  SampleOptions samples;
  SaveOptionsOfRun save;
  LogOptions log;
  FIELDS(out, steps, tokens, device, threads, memory, model, data, batch, schedule, optimizer, mtp, balance,
         validation, samples, save, log)
};

// Throws Error naming the option that cannot be.
void check_train_options(const TrainOptions& options);

}  // namespace latente

#include "train/train_options.h"

namespace latente {

void check_train_options(const TrainOptions& options) {
  auto at_least = [](const char* key, auto value, auto least) {
    if (!(value >= least)) fail("{}: expected at least {}, found {}", key, least, value);
  };
  if (options.out.empty()) fail("out: expected the directory of the run");
  if (options.data.files.empty()) fail("data.files: expected files to train on");
  if ((options.steps > 0) == (options.tokens > 0))
    fail("expected either steps or tokens, and more than 0 of it");
  const ModelOptions& model = options.model;
  if (model.config.empty() == model.from.empty()) {
    fail("model: expected either config (a config.json) or from (a model directory)");
  }
  if (model.tokenizer.empty() && model.from.empty())
    fail("model.tokenizer: expected a directory, a tokenizer.json or a tiktoken.model");
  if (model.dtype != "f32" && model.dtype != "bf16")
    fail("model.dtype: expected f32 or bf16, found {}", model.dtype);
  if (model.fp8 && model.dtype != "bf16")
    fail("model.fp8: expected model.dtype bf16 beside it, found {}", model.dtype);

  const BatchSizeOptions& batch = options.batch;
  at_least("batch.length", batch.length, 2);
  at_least("batch.sequences", batch.sequences, 0);
  if (batch.tokens < batch.length || batch.tokens % batch.length != 0) {
    fail("batch.tokens: expected a multiple of batch.length = {}, found {}", batch.length, batch.tokens);
  }
  int64_t sequences = batch.tokens / batch.length;
  if (batch.sequences > 0 && sequences % batch.sequences != 0) {
    fail("batch.sequences: expected a divisor of the {} sequences a step, found {}", sequences,
         batch.sequences);
  }
  if (!(batch.fim_rate >= 0 && batch.fim_rate <= 1)) {
    fail("batch.fim_rate: expected 0 to 1, found {}", batch.fim_rate);
  }
  const OptimizerOptions& optimizer = options.optimizer;
  for (auto [key, beta] :
       {std::pair("optimizer.beta1", optimizer.beta1), {"optimizer.beta2", optimizer.beta2}}) {
    if (!(beta >= 0 && beta < 1)) fail("{}: expected 0 to below 1, found {}", key, beta);
  }
  if (!(optimizer.epsilon > 0)) fail("optimizer.epsilon: expected above 0, found {}", optimizer.epsilon);
  at_least("optimizer.weight_decay", optimizer.weight_decay, 0.0);
  at_least("optimizer.clip", optimizer.clip, 0.0);
  if (optimizer.moments != "f32" && optimizer.moments != "bf16")
    fail("optimizer.moments: expected f32 or bf16, found {}", optimizer.moments);
  at_least("mtp.lambda", options.mtp.lambda, 0.0);
  at_least("mtp.lambda_after", options.mtp.lambda_after, 0.0);
  const BalanceOptions& balance = options.balance;
  at_least("balance.bias_rate", balance.bias_rate, 0.0);
  at_least("balance.sequence_alpha", balance.sequence_alpha, 0.0);
  at_least("balance.expert_alpha", balance.expert_alpha, 0.0);
  at_least("balance.device_alpha", balance.device_alpha, 0.0);
  at_least("balance.communication_alpha", balance.communication_alpha, 0.0);
  at_least("balance.devices", balance.devices, 1);
  if (balance.devices_per_token < 1 || balance.devices_per_token > balance.devices) {
    fail("balance.devices_per_token: expected 1 to balance.devices = {}, found {}", balance.devices,
         balance.devices_per_token);
  }
  at_least("validation.every", options.validation.every, 0);
  at_least("validation.batches", options.validation.batches, 0);
  at_least("samples.every", options.samples.every, 0);
  at_least("samples.tokens", options.samples.tokens, 1);
  at_least("samples.temperature", options.samples.temperature, 0.0);
  at_least("samples.top_k", options.samples.top_k, 0);
  at_least("save.every", options.save.every, 0);
  at_least("save.keep", options.save.keep, 1);
  at_least("log.every", options.log.every, 1);
  at_least("threads", options.threads, 0);
  at_least("memory", options.memory, 0.0);
}

}  // namespace latente

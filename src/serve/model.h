// A loaded model, as the server's handlers see it.
#pragma once

#include <memory>
#include <string>

#include "grammar/vocabulary.h"
#include "infer/generation.h"
#include "serve/chat_format.h"
#include "serve/engine_loop.h"
#include "tokenizer/tokenizer.h"

namespace latente {

struct ServedModel {
  std::string name;     // that clients know it by
  int64_t created = 0;  // seconds since 1970
  int64_t context = 0;  // tokens a sequence can have
  int64_t layers = 0;   // of the main model
  // A token's part of the cache, MTP modules included; and what it would be were all layers' attention MHA of
  // the same heads.
  int64_t cache_bytes = 0, cache_bytes_mha = 0;
  GenerationOptions defaults;  // sampling as the model's makers and the command line want it; stop tokens
  const Tokenizer* tokenizer = nullptr;
  const ChatFormat* format = nullptr;  // null: it has no chat template
  std::shared_ptr<const grammar::Vocabulary> vocabulary;
  EngineLoop* loop = nullptr;
};

}  // namespace latente

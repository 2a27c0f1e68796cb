#include "serve/api.h"

#include <algorithm>
#include <cctype>

#include "base/utf8.h"
#include "serve/answer.h"
#include "serve/page.h"

namespace latente {
namespace {

constexpr size_t most_kept = 32;  // grammars of a kind

void respond(HttpReply& reply, const Json& body) { reply.respond({200, "application/json"}, dumped(body)); }

// Takes the same time wherever the texts differ.
bool equal(std::string_view secret, std::string_view given) {
  size_t differences = secret.size() ^ given.size();
  for (size_t i = 0; i < given.size(); ++i)
    differences |= static_cast<size_t>(static_cast<unsigned char>(given[i] ^ secret[i % secret.size()]));
  return differences == 0;
}

int64_t random_seed() {
  static std::atomic<int64_t> next = std::chrono::system_clock::now().time_since_epoch().count();
  return next += 7919;
}

}  // namespace

Api::Api(ApiOptions options, Metrics& metrics) : options_(std::move(options)), metrics_(&metrics) {}

void Api::ready(const ServedModel& model) { model_ = &model; }

const Api::Routes& Api::routes() {
  static const Routes all = {
      {"/", {"GET", &Api::show_page, true, true}},
      {"/health", {"GET", &Api::health, true, true}},
      {"/v1/health", {"GET", &Api::health, true, true}},
      {"/metrics", {"GET", &Api::metrics, false, true}},
      {"/v1/models", {"GET", &Api::models}},
      {"/props", {"GET", &Api::props}},
      {"/slots", {"GET", &Api::slots}},
      {"/experts", {"GET", &Api::experts}},
      {"/v1/chat/completions", {"POST", &Api::chat}},
      {"/v1/completions", {"POST", &Api::complete}},
      {"/tokenize", {"POST", &Api::tokenize}},
      {"/detokenize", {"POST", &Api::detokenize}},
      {"/apply-template", {"POST", &Api::apply_template}},
  };
  return all;
}

Api::Routes::const_iterator Api::route_of(std::string_view path) {
  return routes().find(path.starts_with("/v1/models/") ? "/v1/models" : path);
}

std::string Api::known_path(const std::string& target) {
  const auto route = route_of(std::string_view(target).substr(0, target.find('?')));
  return route != routes().end() ? route->first : "other";
}

void Api::handle(HttpRequest request, const std::shared_ptr<HttpReply>& reply) {
  try {
    dispatch(request, reply);
  } catch (const ApiError& error) {
    HttpHeaders headers;
    if (error.status == 429 || error.status == 503) headers.emplace_back("Retry-After", "1");
    if (error.status == 401) headers.emplace_back("WWW-Authenticate", "Bearer");
    if (error.status == 405) headers.emplace_back("Allow", route_of(request.path)->second.method);
    reply->respond({error.status, "application/json", headers},
                   error_body(error.status, error.what(), error.param, error.code));
  } catch (const Error& error) {  // of texts that the tokenizer cannot spell, and the like
    reply->respond({400, "application/json"}, error_body(400, error.what()));
  }
}

void Api::dispatch(const HttpRequest& request, const std::shared_ptr<HttpReply>& reply) {
  if (request.method == "OPTIONS" && !options_.cors.empty()) {
    reply->respond({204,
                    "",
                    {{"Access-Control-Allow-Methods", "GET, POST"},
                     // The star leaves Authorization out; openai's package for browsers sends a dozen others.
                     {"Access-Control-Allow-Headers", "Authorization, *"},
                     {"Access-Control-Max-Age", "86400"}}},
                   "");
    return;
  }
  check_origin(request);
  const auto route = route_of(request.path);
  if (route == routes().end()) throw ApiError(404, "nothing is at " + shown(request.path));
  if (!route->second.open) check_key(request);
  if (request.method != route->second.method)
    throw ApiError(405, fmt::format("{} is for {} alone", route->first, route->second.method));
  if (!route->second.early && !is_ready()) throw ApiError(503, "the model is being loaded", "", "loading");
  (this->*route->second.handler)(request, reply);
}

// Web pages of other origins can send requests here, even if browsers keep the replies from them.
void Api::check_origin(const HttpRequest& request) const {
  if (request.origin.empty() || options_.cors == "*" || request.origin == options_.cors) return;
  const size_t scheme = request.origin.find("://");
  if (scheme != std::string::npos && request.origin.substr(scheme + 3) == request.host) return;
  throw ApiError(403, "requests from pages of " + shown(request.origin) + " are not allowed (--cors)");
}

void Api::check_key(const HttpRequest& request) const {
  if (options_.keys.empty()) return;
  constexpr std::string_view scheme = "bearer ";
  std::string_view given = request.authorization;
  const auto same = [](char letter, char here) {
    return std::tolower(static_cast<unsigned char>(here)) == letter;
  };
  if (given.size() < scheme.size() || !std::equal(scheme.begin(), scheme.end(), given.begin(), same))
    throw ApiError(401, "expected the header Authorization: Bearer KEY", "", "invalid_api_key");
  given.remove_prefix(scheme.size());
  bool known = false;
  for (const std::string& key : options_.keys) known |= equal(key, given);
  if (!known) throw ApiError(401, "the API key is not one of this server", "", "invalid_api_key");
}

// -- What the server says of itself

void Api::health(const HttpRequest&, const std::shared_ptr<HttpReply>& reply) {
  if (!is_ready()) throw ApiError(503, "the model is being loaded", "", "loading");
  respond(*reply, {{"status", "ok"}});
}

void Api::show_page(const HttpRequest&, const std::shared_ptr<HttpReply>& reply) {
  // Whatever a model writes, the page loads nothing and talks to this server alone.
  reply->respond({200,
                  "text/html; charset=utf-8",
                  {{"Content-Security-Policy",
                    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src "
                    "'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'"},
                   {"Referrer-Policy", "no-referrer"},
                   {"X-Content-Type-Options", "nosniff"}}},
                 std::string(page));
}

void Api::metrics(const HttpRequest&, const std::shared_ptr<HttpReply>& reply) {
  Metrics::Gauges gauges;
  std::vector<Runner::ExpertLoad> experts;
  if (is_ready()) {
    gauges = model().loop->gauges();
    experts = model().loop->expert_loads();
  }
  if (options_.connections) gauges.connections = options_.connections();
  reply->respond({200, "text/plain; version=0.0.4; charset=utf-8"},
                 metrics_->text(gauges, experts, options_.each_expert));
}

void Api::models(const HttpRequest& request, const std::shared_ptr<HttpReply>& reply) {
  const Json one = {{"id", model().name},
                    {"object", "model"},
                    {"created", model().created},
                    {"owned_by", "latente"},
                    {"max_model_len", model().context}};
  constexpr std::string_view prefix = "/v1/models/";
  if (!request.path.starts_with(prefix)) {
    respond(*reply, {{"object", "list"}, {"data", Json::array({one})}});
    return;
  }
  if (request.path.substr(prefix.size()) != model().name)
    throw ApiError(404, "there is no model " + shown(request.path.substr(prefix.size())), "model",
                   "model_not_found");
  respond(*reply, one);
}

void Api::props(const HttpRequest&, const std::shared_ptr<HttpReply>& reply) {
  const SamplingOptions& sampling = model().defaults.sampling;
  const Json settings = {{"n_ctx", model().context},
                         {"params",
                          {{"temperature", sampling.temperature},
                           {"top_k", sampling.top_k},
                           {"top_p", sampling.top_p},
                           {"min_p", sampling.min_p},
                           {"typical_p", sampling.typical_p},
                           {"repeat_penalty", sampling.repetition_penalty},
                           {"presence_penalty", sampling.presence_penalty},
                           {"frequency_penalty", sampling.frequency_penalty}}}};
  respond(*reply, {{"default_generation_settings", settings},
                   {"total_slots", model().loop->gauges().places},
                   {"n_layer", model().layers},
                   {"cache_bytes_per_token", model().cache_bytes},
                   {"cache_bytes_per_token_mha", model().cache_bytes_mha},
                   {"model_alias", model().name},
                   {"chat_template", model().format != nullptr ? model().format->source() : ""},
                   {"bos_token", model().tokenizer->bos_token()},
                   {"eos_token", model().tokenizer->eos_token()}});
}

// How many tokens each routed expert was chosen for since the server started. Layers from the model's number
// of them on are MTP modules.
void Api::experts(const HttpRequest&, const std::shared_ptr<HttpReply>& reply) {
  Json layers = Json::array();
  for (const auto& [layer, tokens] : model().loop->expert_loads())
    layers.push_back({{"layer", layer}, {"tokens", tokens}});
  respond(*reply, {{"layers", std::move(layers)}});
}

// One for each sequence that can run, as llama.cpp's server has them; without prompts.
void Api::slots(const HttpRequest&, const std::shared_ptr<HttpReply>& reply) {
  model().loop->post([reply, context = model().context](EngineLoop& loop) {
    Json slots = Json::array();
    for (const Engine::SequenceFigures& one : loop.engine().sequences()) {
      if (!one.running) continue;
      slots.push_back({{"id", slots.size()},
                       {"id_task", one.id},
                       {"n_ctx", context},
                       {"is_processing", true},
                       {"n_prompt_tokens", one.prompt_tokens},
                       {"n_prompt_tokens_processed", std::min(one.processed, one.prompt_tokens)},
                       {"n_decoded", one.generated_tokens},
                       {"n_drafted", one.drafted},
                       {"n_accepted", one.accepted}});
    }
    while (std::ssize(slots) < loop.engine().runner().options().sequences)
      slots.push_back({{"id", slots.size()}, {"n_ctx", context}, {"is_processing", false}});
    respond(*reply, slots);
  });
}

// -- Text and tokens

const ChatFormat& Api::format() const {
  if (model().format == nullptr) throw ApiError(400, "the model has no chat template: use /v1/completions");
  return *model().format;
}

void Api::apply_template(const HttpRequest& request, const std::shared_ptr<HttpReply>& reply) {
  ChatRequest chat;
  read_conversation(parse_body(request.body), chat);
  respond(*reply, {{"prompt", format().prompt(chat)}});
}

void Api::tokenize(const HttpRequest& request, const std::shared_ptr<HttpReply>& reply) {
  const Json body = parse_body(request.body);
  const Tokenizer& tokenizer = *model().tokenizer;
  std::vector<int32_t> ids;
  if (field(body, "messages") != nullptr) {
    ChatRequest chat;
    read_conversation(body, chat);
    ids = tokenizer.encode(format().prompt(chat), {.add_special = false});
  } else {
    // llama.cpp's server calls it content, vLLM prompt; each has its own default.
    const bool content = field(body, "content") != nullptr;
    const char* key = content ? "content" : "prompt";
    const std::optional<std::string> text = text_field(body, key);
    if (!text) refuse("content", "expected a text");
    EncodeOptions how;
    how.add_special = flag_field(body, content ? "add_special" : "add_special_tokens").value_or(!content);
    how.parse_special = flag_field(body, "parse_special").value_or(true);
    ids = tokenizer.encode(*text, how);
  }
  Json tokens = ids;
  if (flag_field(body, "with_pieces").value_or(false)) {
    for (Json& id : tokens) {
      const std::string bytes = tokenizer.token_bytes(id.get<int32_t>());
      const bool text = unicode::valid_prefix(bytes) == bytes.size();
      id = Json{{"id", id}, {"piece", text ? Json(bytes) : byte_list(bytes)}};
    }
  }
  respond(*reply, {{"tokens", std::move(tokens)}, {"count", ids.size()}, {"max_model_len", model().context}});
}

void Api::detokenize(const HttpRequest& request, const std::shared_ptr<HttpReply>& reply) {
  const Json body = parse_body(request.body);
  const Json* tokens = field(body, "tokens");
  if (tokens == nullptr || !tokens->is_array()) refuse("tokens", "expected an array of token ids");
  std::vector<int32_t> ids;
  for (const Json& id : *tokens) {
    if (!id.is_number_integer() || id < 0 || id >= model().tokenizer->vocab_size())
      refuse("tokens", "expected ids from 0 to {}, found {}", model().tokenizer->vocab_size() - 1, shown(id));
    ids.push_back(id.get<int32_t>());
  }
  const std::string text = model().tokenizer->decode(ids);
  respond(*reply, {{"content", text}, {"prompt", text}});
}

// -- Generation

void Api::check_length(const std::vector<int32_t>& prompt, const char* param) const {
  if (prompt.empty()) throw ApiError(400, "the prompt is empty", param);
  if (std::ssize(prompt) >= model().context)
    throw ApiError(
        400,
        fmt::format(
            "the prompt has {} tokens, but this model's context has room for {} and at least one more",
            prompt.size(), model().context - 1),
        param, "context_length_exceeded");
}

void Api::reserve(int64_t sequences) const {
  if (!model().loop->reserve(sequences))
    throw ApiError(429, "too many requests are waiting: try again later", "", "queue_full");
}

std::shared_ptr<const grammar::TokenGrammar> Api::grammar_of(const ResponseForm& form,
                                                             const ChatRequest* chat, bool reasoning) {
  const bool calls = chat != nullptr && chat->tool_choice.kind == ToolChoice::Kind::required;
  if (!calls && form.kind == ResponseForm::Kind::text) return nullptr;
  std::string key = fmt::format("{} {} {}", static_cast<int>(form.kind), reasoning, form.schema);
  if (calls)
    key += fmt::format(" {} {} {}", chat->tool_choice.name, chat->parallel_tool_calls, chat->tools.dump());
  {
    const std::lock_guard lock(mutex_);
    if (const auto found = grammars_.find(key); found != grammars_.end()) return found->second;
  }
  const std::optional<grammar::Grammar> rules =
      reply_grammar(form, chat, calls ? format().tools() : ToolSyntax(), reasoning);
  const auto made = compiled(*rules);
  const std::lock_guard lock(mutex_);
  if (grammars_.size() >= most_kept) grammars_.clear();
  grammars_[key] = made;
  return made;
}

std::vector<TriggeredConstraint::Mark> Api::calls_of(const ChatRequest& chat) {
  const std::string key = fmt::format("{} {}", chat.parallel_tool_calls, chat.tools.dump());
  {
    const std::lock_guard lock(mutex_);
    if (const auto found = calls_.find(key); found != calls_.end()) return found->second;
  }
  std::vector<TriggeredConstraint::Mark> made;
  for (const OpenedCall& opened : opened_calls(chat, format().tools()))
    made.push_back({opened.mark, compiled(opened.grammar)});
  const std::lock_guard lock(mutex_);
  if (calls_.size() >= most_kept) calls_.clear();
  calls_[key] = made;
  return made;
}

std::shared_ptr<const grammar::TokenGrammar> Api::compiled(const grammar::Grammar& rules) const {
  return std::make_shared<grammar::TokenGrammar>(std::make_shared<grammar::Automaton>(rules),
                                                 model().vocabulary);
}

void Api::chat(const HttpRequest& request, const std::shared_ptr<HttpReply>& reply) {
  const ChatRequest chat = read_chat(parse_body(request.body), model().defaults, options_.limits);
  const GenerationSettings& settings = chat.settings;
  const std::string text = format().prompt(chat);
  const std::vector<int32_t> prompt = model().tokenizer->encode(text, {.add_special = false});
  check_length(prompt, "messages");

  AnswerOptions how;
  how.chat = true;
  how.stream = settings.stream;
  how.include_usage = settings.include_usage;
  how.live_timings = settings.timings_per_token;
  how.logprobs = settings.logprobs;
  how.choices_a_prompt = static_cast<size_t>(settings.choices);
  how.stop = settings.stop;
  how.parser.reasons = format().reasons();
  how.parser.reasoning = format().reasons() && opens_reasoning(text);
  if (chat.tool_choice.kind != ToolChoice::Kind::none) {
    how.parser.tools = &format().tools();
    how.parser.known = chat.tool_list;
    how.show_special = true;
  }
  how.grammar = grammar_of(settings.form, &chat, how.parser.reasoning);
  if (!how.grammar && chat.tool_choice.kind == ToolChoice::Kind::automatic) {
    how.calls = calls_of(chat);
    how.scope.at_beginning = format().tools().kind == ToolSyntax::Kind::bare;
    if (how.parser.reasons) {
      how.scope.opening = think_begin;
      how.scope.closing = think_end;
      how.scope.opened = how.parser.reasoning;
    }
  }

  GenerationOptions options = settings.options;
  options.max_tokens = std::min({settings.max_tokens.value_or(model().context),
                                 model().context - std::ssize(prompt), options_.limits.max_tokens});
  if (!options.repeatable) options.sampling.seed = static_cast<uint64_t>(random_seed());
  const auto answer = std::make_shared<Answer>(model(), how, reply, *metrics_);
  reserve(settings.choices);
  for (int64_t i = 0; i < settings.choices; ++i) {
    answer->add(prompt, options);
    ++options.sampling.seed;
  }
  answer->start();
}

void Api::complete(const HttpRequest& request, const std::shared_ptr<HttpReply>& reply) {
  constexpr int64_t usual_tokens = 16;  // OpenAI's
  const CompletionRequest completion =
      read_completion(parse_body(request.body), model().defaults, options_.limits);
  const GenerationSettings& settings = completion.settings;

  AnswerOptions how;
  how.stream = settings.stream;
  how.include_usage = settings.include_usage;
  how.live_timings = settings.timings_per_token;
  how.logprobs = settings.logprobs;
  how.echo = completion.echo;
  how.choices_a_prompt = static_cast<size_t>(settings.choices);
  how.stop = settings.stop;
  how.grammar = grammar_of(settings.form, nullptr, false);
  std::vector<std::vector<int32_t>> prompts;
  for (const CompletionRequest::Prompt& given : completion.prompts) {
    const auto* ids = std::get_if<std::vector<int32_t>>(&given);
    prompts.push_back(ids != nullptr ? *ids : model().tokenizer->encode(std::get<std::string>(given)));
    check_length(prompts.back(), "prompt");
    for (int32_t id : prompts.back()) {
      if (id >= static_cast<int64_t>(model().vocabulary->size()))
        refuse("prompt", "token {} lies outside the vocabulary of {}", id, model().vocabulary->size());
    }
  }
  const auto answer = std::make_shared<Answer>(model(), how, reply, *metrics_);
  // Before there is a copy of the prompt for each: several hundred times thousands may be asked for.
  reserve(std::ssize(prompts) * settings.choices);
  GenerationOptions options = settings.options;
  if (!options.repeatable) options.sampling.seed = static_cast<uint64_t>(random_seed());
  for (const std::vector<int32_t>& prompt : prompts) {
    options.max_tokens = std::min({settings.max_tokens.value_or(usual_tokens),
                                   model().context - std::ssize(prompt), options_.limits.max_tokens});
    for (int64_t i = 0; i < settings.choices; ++i) {
      answer->add(prompt, options);
      ++options.sampling.seed;
    }
  }
  answer->start();
}

}  // namespace latente

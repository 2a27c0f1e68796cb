// The routes of OpenAI's protocol, and those that llama.cpp's server has beside them.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "grammar/token_masks.h"
#include "infer/triggered_constraint.h"
#include "serve/http.h"
#include "serve/metrics.h"
#include "serve/model.h"
#include "serve/request.h"

namespace latente {

struct ApiOptions {
  std::vector<std::string>
      keys;          // one of them must come with each request but /health; none = anybody may ask
  std::string cors;  // as HttpOptions::cors
  RequestLimits limits;
  bool each_expert = false;                // as Metrics::text
  std::function<int64_t()> connections{};  // for /metrics
};

class Api {
 public:
  Api(ApiOptions options, Metrics& metrics);

  // Before this, everything but /health, /metrics and errors is answered with 503. The model must outlive the
  // Api.
  void ready(const ServedModel& model);
  bool is_ready() const { return model_ != nullptr; }

  // An HttpHandler.
  void handle(HttpRequest request, const std::shared_ptr<HttpReply>& reply);
  // The path of a target if it is one that exists, for metrics; else "other".
  static std::string known_path(const std::string& target);

 private:
  using Handler = void (Api::*)(const HttpRequest&, const std::shared_ptr<HttpReply>&);
  struct Route {
    const char* method;
    Handler handler;
    bool open = false;   // without a key
    bool early = false;  // before the model is loaded
  };
  using Routes = std::map<std::string, Route, std::less<>>;
  static const Routes& routes();
  static Routes::const_iterator route_of(std::string_view path);
  void dispatch(const HttpRequest& request, const std::shared_ptr<HttpReply>& reply);
  void check_origin(const HttpRequest& request) const;
  void check_key(const HttpRequest& request) const;

  void health(const HttpRequest& request, const std::shared_ptr<HttpReply>& reply);
  void show_page(const HttpRequest&, const std::shared_ptr<HttpReply>& reply);
  void metrics(const HttpRequest& request, const std::shared_ptr<HttpReply>& reply);
  void models(const HttpRequest& request, const std::shared_ptr<HttpReply>& reply);
  void props(const HttpRequest& request, const std::shared_ptr<HttpReply>& reply);
  void experts(const HttpRequest& request, const std::shared_ptr<HttpReply>& reply);
  void slots(const HttpRequest& request, const std::shared_ptr<HttpReply>& reply);
  void chat(const HttpRequest& request, const std::shared_ptr<HttpReply>& reply);
  void complete(const HttpRequest& request, const std::shared_ptr<HttpReply>& reply);
  void tokenize(const HttpRequest& request, const std::shared_ptr<HttpReply>& reply);
  void detokenize(const HttpRequest& request, const std::shared_ptr<HttpReply>& reply);
  void apply_template(const HttpRequest& request, const std::shared_ptr<HttpReply>& reply);

  const ServedModel& model() const { return *model_; }
  const ChatFormat& format() const;
  void check_length(const std::vector<int32_t>& prompt, const char* param) const;
  void reserve(int64_t sequences) const;
  // Compiled, or known from an earlier request.
  std::shared_ptr<const grammar::TokenGrammar> grammar_of(const ResponseForm& form, const ChatRequest* chat,
                                                          bool reasoning);
  // The same of calls in replies that need not have any.
  std::vector<TriggeredConstraint::Mark> calls_of(const ChatRequest& chat);
  std::shared_ptr<const grammar::TokenGrammar> compiled(const grammar::Grammar& rules) const;

  ApiOptions options_;
  Metrics* metrics_;
  std::atomic<const ServedModel*> model_ = nullptr;
  std::mutex mutex_;
  std::map<std::string, std::shared_ptr<const grammar::TokenGrammar>> grammars_;
  std::map<std::string, std::vector<TriggeredConstraint::Mark>> calls_;
};

}  // namespace latente

#include "serve/http.h"

#include <algorithm>
#include <nlohmann/json.hpp>

namespace latente {

void HttpReply::respond(Head head, std::string body) {
  {
    const std::lock_guard lock(mutex_);
    if (state_.begun) return;
    state_.head = std::move(head);
    state_.data = std::move(body);
    state_.begun = state_.ended = true;
  }
  wake_once();
}

void HttpReply::begin(Head head) {
  const std::lock_guard lock(mutex_);
  if (state_.begun) return;
  state_.head = std::move(head);
  state_.begun = state_.streamed = true;
}

void HttpReply::write(std::string_view piece) {
  const std::lock_guard lock(mutex_);
  if (!state_.streamed || state_.ended) return;
  state_.data += piece;
}

void HttpReply::flush() { wake_once(); }

void HttpReply::end() {
  {
    const std::lock_guard lock(mutex_);
    state_.ended = true;
  }
  wake_once();
}

void HttpReply::wake_once() {
  {
    const std::lock_guard lock(mutex_);
    if (std::exchange(woken_, true)) return;
  }
  if (wake_) wake_();
}

bool HttpReply::begun() const {
  const std::lock_guard lock(mutex_);
  return state_.begun;
}

void HttpReply::count(const Tokens& tokens) {
  const std::lock_guard lock(mutex_);
  state_.tokens = tokens;
}

HttpReply::Taken HttpReply::take() {
  const std::lock_guard lock(mutex_);
  woken_ = false;
  return {state_.begun,
          state_.streamed,
          state_.ended,
          std::exchange(state_.head, {}),
          std::exchange(state_.data, {}),
          state_.tokens};
}

void HttpReply::on_abandoned(std::function<void(Abandoned)> callback) {
  std::vector<Abandoned> reasons;
  {
    const std::lock_guard lock(mutex_);
    abandoned_ = callback;
    reasons = reasons_;
  }
  for (Abandoned reason : reasons) callback(reason);
}

void HttpReply::abandon(Abandoned reason) {
  std::function<void(Abandoned)> callback;
  {
    const std::lock_guard lock(mutex_);
    if (std::find(reasons_.begin(), reasons_.end(), reason) != reasons_.end()) return;
    reasons_.push_back(reason);
    callback = abandoned_;
  }
  if (callback) callback(reason);
}

std::string error_body(int status, const std::string& message, const std::string& param,
                       const std::string& code) {
  const char* type = status == 401   ? "authentication_error"
                     : status == 403 ? "permission_error"
                     : status == 404 ? "not_found_error"
                     : status == 429 ? "rate_limit_error"
                     : status >= 500 ? "server_error"
                                     : "invalid_request_error";
  const auto text_or_null = [](const std::string& text) {
    return text.empty() ? nlohmann::ordered_json() : nlohmann::ordered_json(text);
  };
  const nlohmann::ordered_json error = {
      {"error",
       {{"message", message}, {"type", type}, {"param", text_or_null(param)}, {"code", text_or_null(code)}}}};
  return error.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace latente

#include "infer/triggered_constraint.h"

#include <algorithm>

#include "base/error.h"

namespace latente {
namespace {

size_t longest_of(const std::vector<TriggeredConstraint::Mark>& marks) {
  LATENTE_ASSERT(!marks.empty());
  size_t longest = 0;
  for (const auto& mark : marks) longest = std::max(longest, mark.text.size());
  return longest;
}

}  // namespace

TriggeredConstraint::TriggeredConstraint(std::vector<Mark> marks, Scope scope) {
  state_ = scope.opened ? State::between : scope.opening.empty() ? State::looking : State::beginning;
  const size_t longest = longest_of(marks);
  shared_ = std::make_shared<Shared>(Shared{std::move(marks), std::move(scope), longest});
}

std::unique_ptr<TokenConstraint> TriggeredConstraint::fork() const {
  return std::make_unique<TriggeredConstraint>(*this);
}

std::span<const uint64_t> TriggeredConstraint::admitted() {
  if (!matcher_) return {};
  matcher_->admitted(mask_);
  return mask_;
}

bool TriggeredConstraint::accept(int32_t token) {
  if (matcher_) return matcher_->accept(token);
  const grammar::Vocabulary& vocabulary = shared_->marks.front().grammar->vocabulary();
  if (state_ == State::free || vocabulary.stops(token)) return true;
  text_ += vocabulary.text(token);
  while (advance()) {
  }
  return true;
}

void TriggeredConstraint::keep(size_t bytes) {
  if (text_.size() > bytes) text_.erase(0, text_.size() - bytes);
}

// Whether the state changed, and there may be more to do.
bool TriggeredConstraint::advance() {
  const Scope& scope = shared_->scope;
  switch (state_) {
    case State::beginning: {
      const size_t at = std::min(text_.find_first_not_of(" \t\r\n"), text_.size());
      const std::string_view found = std::string_view(text_).substr(at, scope.opening.size());
      if (found == scope.opening) {
        state_ = State::between;
        return true;
      }
      if (scope.opening.starts_with(found)) return false;
      state_ = State::looking;
      return true;
    }
    case State::between: {
      const size_t at = text_.find(scope.closing);
      if (at == text_.npos) {
        keep(scope.closing.size() - 1);
        return false;
      }
      text_.erase(0, at + scope.closing.size());
      state_ = State::looking;
      return true;
    }
    case State::looking:
      return look();
    case State::held:
    case State::free:
      return false;
  }
  return false;
}

bool TriggeredConstraint::look() {
  const bool at_beginning = shared_->scope.at_beginning;
  if (at_beginning) text_.erase(0, std::min(text_.find_first_not_of(" \t\r\n"), text_.size()));
  const Mark* first = nullptr;
  size_t place = text_.npos;
  bool possible = false;
  for (const Mark& mark : shared_->marks) {
    const size_t at = at_beginning ? (text_.starts_with(mark.text) ? 0 : text_.npos) : text_.find(mark.text);
    possible |= mark.text.starts_with(text_);
    if (at >= place) continue;
    first = &mark;
    place = at;
  }
  if (first == nullptr) {
    if (!at_beginning) keep(shared_->longest - 1);
    if (at_beginning && !possible) state_ = State::free;
    return false;
  }
  grammar::Matcher matcher(first->grammar);
  if (matcher.accept_text(std::string_view(text_).substr(place))) {
    matcher_ = std::move(matcher);
    mask_.resize(first->grammar->vocabulary().words());
    state_ = State::held;
    return false;
  }
  text_.erase(0, place + first->text.size());
  if (at_beginning) state_ = State::free;
  return true;
}

}  // namespace latente

#include "tokenizer/decoder.h"

#include "tokenizer/byte_alphabet.h"
#include "tokenizer/unicode.h"

namespace latente {

// Tokens arrive as pieces of text, each token closed by end_token(). What a stage passes on has the same
// form; one that makes a single token of all closes it in finish().
class DecoderChain::Stage {
 public:
  virtual ~Stage() = default;
  virtual void text(std::string_view piece) = 0;
  virtual void end_token() = 0;
  virtual void finish() { next_->finish(); }
  void connect(Stage& next) { next_ = &next; }

 protected:
  void pass(std::string_view token) {
    next_->text(token);
    next_->end_token();
  }
  Stage* next_ = nullptr;
};

namespace {

using Stage = DecoderChain::Stage;

class Collect : public Stage {
 public:
  void text(std::string_view piece) override { out += piece; }
  void end_token() override {}
  void finish() override {}
  std::string out;
};

// Needs whole tokens.
class TokenStage : public Stage {
 public:
  void text(std::string_view piece) final { token_ += piece; }
  void end_token() final {
    take(token_);
    token_.clear();
  }

 protected:
  virtual void take(std::string_view token) = 0;

 private:
  std::string token_;
};

class JoinBySpace : public Stage {
 public:
  void text(std::string_view piece) override {
    open();
    next_->text(piece);
  }
  void end_token() override {
    open();
    started_ = false;
    any_ = true;
  }

 private:
  void open() {
    if (!started_ && any_) next_->text(" ");
    started_ = true;
  }
  bool any_ = false, started_ = false;
};

class Fuse : public Stage {
 public:
  void text(std::string_view piece) override { next_->text(piece); }
  void end_token() override {}
  void finish() override {
    next_->end_token();
    next_->finish();
  }
};

class ByteLevel : public TokenStage {
 public:
  void finish() override {
    std::string out;
    unicode::append_lossy(out, pending_);
    pending_.clear();
    pass(out);
    next_->finish();
  }

 protected:
  // A token with a character beyond the alphabet stands for itself.
  void take(std::string_view token) override {
    if (const auto bytes = unspell_bytes(token)) {
      pending_ += *bytes;
    } else {
      pending_ += token;
    }
    std::string out;
    std::string_view rest = pending_;
    while (!rest.empty()) {
      std::size_t incomplete;
      const std::size_t valid = unicode::valid_prefix(rest, &incomplete);
      out.append(rest, 0, valid);
      rest.remove_prefix(valid);
      if (rest.empty() || incomplete == rest.size()) break;
      unicode::append(out, 0xFFFD);
      rest.remove_prefix(unicode::invalid_part(rest));
    }
    pending_ = std::string(rest);
    if (!out.empty()) next_->text(out);
  }

 private:
  std::string pending_;  // an incomplete character
};

// Tokens "<0xNN>" in a row are bytes: text if together they are UTF-8, else one U+FFFD each.
class ByteFallback : public TokenStage {
 public:
  void finish() override {
    flush();
    next_->finish();
  }

 protected:
  void take(std::string_view token) override {
    if (const int byte = byte_of(token); byte >= 0) {
      bytes_ += static_cast<char>(byte);
    } else {
      flush();
      pass(token);
    }
  }

 private:
  static int byte_of(std::string_view token) {
    if (token.size() != 6 || !token.starts_with("<0x") || !token.ends_with('>')) return -1;
    const auto digit = [](char c) {
      return c >= '0' && c <= '9'   ? c - '0'
             : c >= 'a' && c <= 'f' ? c - 'a' + 10
             : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                    : -1;
    };
    const int low = digit(token[4]);
    const int high = token[3] == '+' ? 0 : digit(token[3]);  // Rust's number parser takes a sign
    return low < 0 || high < 0 ? -1 : high << 4 | low;
  }

  void flush() {
    if (bytes_.empty()) return;
    if (unicode::valid_prefix(bytes_) == bytes_.size()) {
      pass(bytes_);
    } else {
      for (std::size_t i = 0; i < bytes_.size(); ++i) pass("\uFFFD");
    }
    bytes_.clear();
  }

  std::string bytes_;
};

// Drops up to `start` of its characters at a token's start, up to `stop` at its end.
class Strip : public Stage {
 public:
  explicit Strip(const DecoderStep& step) : step_(step), start_left_(step.start) {}

  void text(std::string_view piece) override {
    for (; start_left_ > 0 && !piece.empty(); --start_left_) {
      if (!piece.starts_with(step_.content)) {
        start_left_ = 0;
        break;
      }
      piece.remove_prefix(step_.content.size());
    }
    held_ += piece;
    std::size_t keep = 0;  // characters that may yet turn out to be the last
    std::size_t end = held_.size();
    while (keep < step_.stop && std::string_view(held_).substr(0, end).ends_with(step_.content)) {
      end -= step_.content.size();
      ++keep;
    }
    next_->text(std::string_view(held_).substr(0, end));
    held_.erase(0, end);
  }

  void end_token() override {
    held_.clear();
    start_left_ = step_.start;
    next_->end_token();
  }

 private:
  const DecoderStep& step_;
  std::size_t start_left_;
  std::string held_;
};

class Replace : public TokenStage {
 public:
  explicit Replace(const DecoderStep& step) : step_(step) {}

 protected:
  void take(std::string_view token) override {
    std::string out;
    std::size_t done = 0, begin, end;
    if (!token.empty()) {
      Regex::Matches matches(*step_.pattern, token);
      while (matches.next(begin, end)) {
        out.append(token, done, begin - done);
        out += step_.content;
        done = end;
      }
      out.append(token, done);
    }
    pass(out);
  }

 private:
  const DecoderStep& step_;
};

class Metaspace : public TokenStage {
 public:
  explicit Metaspace(const DecoderStep& step) : step_(step) {}

 protected:
  void take(std::string_view token) override {
    std::string out;
    while (!token.empty()) {
      if (token.starts_with(step_.content)) {
        if (!first_ || !step_.drops_first) out += ' ';
        token.remove_prefix(step_.content.size());
      } else {
        out += token[0];
        token.remove_prefix(1);
      }
    }
    first_ = false;
    pass(out);
  }

 private:
  const DecoderStep& step_;
  bool first_ = true;
};

// The suffix becomes a space, in the last token nothing.
class BpeSuffix : public TokenStage {
 public:
  explicit BpeSuffix(const DecoderStep& step) : step_(step) {}
  void finish() override {
    release("");
    next_->finish();
  }

 protected:
  void take(std::string_view token) override {
    release(" ");
    last_ = token;
  }

 private:
  void release(std::string_view replacement) {
    if (!last_) return;
    std::string out;
    std::size_t done = 0;
    for (std::size_t at; (at = last_->find(step_.content, done)) != std::string::npos;) {
      out.append(*last_, done, at - done);
      out += replacement;
      done = at + step_.content.size();
    }
    out.append(*last_, done);
    last_.reset();
    pass(out);
  }

  const DecoderStep& step_;
  std::optional<std::string> last_;
};

std::unique_ptr<Stage> make_stage(const DecoderStep& step) {
  switch (step.kind) {
    case DecoderStep::Kind::byte_level:
      return std::make_unique<ByteLevel>();
    case DecoderStep::Kind::byte_fallback:
      return std::make_unique<ByteFallback>();
    case DecoderStep::Kind::fuse:
      return std::make_unique<Fuse>();
    case DecoderStep::Kind::strip:
      return std::make_unique<Strip>(step);
    case DecoderStep::Kind::replace:
      return std::make_unique<Replace>(step);
    case DecoderStep::Kind::metaspace:
      return std::make_unique<Metaspace>(step);
    case DecoderStep::Kind::bpe:
      return std::make_unique<BpeSuffix>(step);
  }
  return nullptr;
}

}  // namespace

DecoderChain::DecoderChain(const Decoder& decoder) {
  for (const DecoderStep& step : decoder.steps) stages_.push_back(make_stage(step));
  if (!decoder.present) stages_.push_back(std::make_unique<JoinBySpace>());
  stages_.push_back(std::make_unique<Collect>());
  for (std::size_t i = 0; i + 1 < stages_.size(); ++i) stages_[i]->connect(*stages_[i + 1]);
}

DecoderChain::~DecoderChain() = default;
DecoderChain::DecoderChain(DecoderChain&&) noexcept = default;
DecoderChain& DecoderChain::operator=(DecoderChain&&) noexcept = default;

void DecoderChain::token(std::string_view text) {
  stages_.front()->text(text);
  stages_.front()->end_token();
}

void DecoderChain::finish() { stages_.front()->finish(); }

std::string DecoderChain::take() { return std::exchange(static_cast<Collect&>(*stages_.back()).out, {}); }

}  // namespace latente

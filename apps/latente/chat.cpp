// latente chat: a conversation in the terminal, through the checkpoint's own chat template.
#include <unistd.h>

#include <cstdio>
#include <iostream>

#include "commands.h"
#include "session.h"
#include "tokenizer/chat_template.h"

namespace latente {
namespace {

struct ChatOptions {
  SessionOptions session;
  std::string system;
};

class Chat {
 public:
  explicit Chat(const ChatOptions& options)
      : options_(options), session_(options.session), template_(source()) {
    clear();
  }

  void run() {
    bool terminal = isatty(STDIN_FILENO) != 0;
    if (terminal) std::fprintf(stderr, "/help for commands; Ctrl-C stops a reply, Ctrl-D leaves\n");
    for (std::string line; prompt(terminal), std::getline(std::cin, line);) {
      if (line.empty()) continue;
      if (line[0] == '/') {
        if (!command(line)) return;
      } else {
        say(line);
      }
    }
    if (terminal) std::fputs("\n", stdout);
  }

 private:
  std::string source() const {
    if (session_.tokenizer().chat_template().empty()) {
      fail("{}: has no chat template (tokenizer_config.json or chat_template.jinja); use generate",
           options_.session.model);
    }
    return session_.tokenizer().chat_template();
  }

  static void prompt(bool terminal) {
    if (terminal) std::fputs("\n> ", stdout), std::fflush(stdout);
  }

  void clear() {
    messages_.clear();
    if (!options_.system.empty()) messages_.push_back({"system", options_.system});
  }

  // False = leave.
  bool command(const std::string& line) {
    if (line == "/quit" || line == "/exit") return false;
    if (line == "/clear") {
      clear();
      std::fputs("the conversation is empty\n", stderr);
    } else if (line == "/stats") {
      std::fprintf(stderr, "%s\n", session_.describe(stats_).c_str());
    } else {
      std::fputs("/clear   forget the conversation\n/stats   speed of the last reply\n/quit    leave\n",
                 stderr);
    }
    return true;
  }

  void say(const std::string& text) {
    messages_.push_back({"user", text});
    const Tokenizer& tokenizer = session_.tokenizer();
    std::string rendered = template_.render(messages_, true, tokenizer.bos_token(), tokenizer.eos_token());
    EncodeOptions encode;
    encode.add_special = false;  // the template writes its own
    auto show = [](std::string_view piece) {
      std::fwrite(piece.data(), 1, piece.size(), stdout);
      std::fflush(stdout);
    };
    std::string reply = session_.reply(tokenizer.encode(rendered, encode), show, stats_);
    std::fputs("\n", stdout);
    messages_.push_back({"assistant", reply});
    if (options_.session.stats) std::fprintf(stderr, "%s\n", session_.describe(stats_).c_str());
  }

  ChatOptions options_;
  Session session_;
  ChatTemplate template_;
  std::vector<ChatMessage> messages_;
  GenerationStats stats_;
};

}  // namespace

void add_chat(CLI::App& app) {
  auto options = std::make_shared<ChatOptions>();
  CLI::App* command = app.add_subcommand("chat", "Talk to a model through its chat template");
  add_session_options(*command, options->session);
  command->add_option("--system", options->system, "System message");
  command->callback([options] { Chat(*options).run(); });
}

}  // namespace latente

// latente chat: a conversation in the terminal, through the checkpoint's own chat template.
#include <poll.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <map>

#include "commands.h"
#include "messages.h"
#include "session.h"

namespace latente {
namespace {

constexpr size_t longest_line = 4095;  // that a Linux terminal passes on; it drops the rest

std::atomic<bool> interrupted_at_prompt = false;

struct ChatOptions {
  SessionOptions session;
  std::string system;
  std::string session_file;
};

class Chat {
 public:
  explicit Chat(const ChatOptions& options) : options_(options), session_(options.session) {
    session_.chat_template();  // or an error
    clear();
    if (options_.session_file.empty()) return;
    if (std::filesystem::exists(options_.session_file)) {
      restore();
      return;
    }
    // Found now rather than when there is a conversation to lose.
    const std::string directory = std::filesystem::path(options_.session_file).parent_path();
    if (access(directory.empty() ? "." : directory.c_str(), W_OK) != 0)
      fail("--session {}: cannot be written: {}", options_.session_file, std::strerror(errno));
  }

  void run() {
    converse();
    if (!options_.session_file.empty() && !session_.tokens().empty()) save();  // else nothing was said
  }

 private:
  void converse() {
    if (isatty(STDIN_FILENO) == 0) {
      for (std::string line; std::getline(std::cin, line);) {
        if (!take(line)) return;
      }
      return;
    }
    std::fputs("/help for commands; Ctrl-C stops a reply, Ctrl-D leaves\n", stderr);
    keep_interrupts_from_ending();
    for (std::string line; ask(line);) {
      try {
        if (!take(line)) return;
      } catch (const Error& error) {
        std::fprintf(stderr, "latente: %s (the line is left out; /clear forgets the conversation)\n",
                     error.what());
      }
    }
    std::fputs("\n", stdout);
  }

  void save() {
    const std::string text =
        json_of(messages_).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    const int64_t tokens =
        session_.engine().save(options_.session_file, session_.tokens(), {{"messages", text}});
    std::fprintf(stderr, "%s: the conversation, with %lld tokens of cache\n", options_.session_file.c_str(),
                 static_cast<long long>(tokens));
  }

  void restore() {
    std::map<std::string, std::string> notes;
    const int64_t tokens = session_.engine().load(options_.session_file, &notes);
    try {
      messages_ = messages_from_json(nlohmann::json::parse(notes["messages"], nullptr, false));
    } catch (const Error& error) {
      fail("{}: {}", options_.session_file, error.what());
    }
    std::fprintf(stderr, "%s: %zu messages, %lld tokens of cache\n", options_.session_file.c_str(),
                 messages_.size(), static_cast<long long>(tokens));
  }

  // A reply handles Ctrl-C by itself (Session); one that comes too late for it must not take the
  // conversation.
  static void keep_interrupts_from_ending() {
    struct sigaction action {};
    action.sa_handler = [](int) { interrupted_at_prompt = true; };
    sigaction(SIGINT, &action, nullptr);  // without SA_RESTART: reading ends, too
  }

  // A line from the terminal; false at its end.
  static bool ask(std::string& line) {
    while (true) {
      interrupted_at_prompt = false;
      std::fputs("\n> ", stdout);
      std::fflush(stdout);
      // Ctrl-C may come before reading begins, or to another thread, and would not end it then.
      pollfd terminal{STDIN_FILENO, POLLIN, 0};
      while (!interrupted_at_prompt && poll(&terminal, 1, 50) <= 0) {
      }
      if (!interrupted_at_prompt && std::getline(std::cin, line)) {
        if (line.size() >= longest_line) std::fputs("(a terminal cuts lines as long as this)\n", stderr);
        return true;
      }
      if (!interrupted_at_prompt) return false;
      std::clearerr(stdin);
      std::cin.clear();
      std::fputs("\nCtrl-D leaves", stderr);
    }
  }

  // False = leave.
  bool take(const std::string& line) {
    if (line.empty()) return true;
    if (line[0] == '/') return command(line);
    say(line);
    return true;
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
    } else if (line == "/save") {
      if (options_.session_file.empty()) {
        std::fputs("there is no --session FILE to save to\n", stderr);
      } else {
        save();
      }
    } else if (line == "/stats") {
      std::fprintf(stderr, "%s\n", session_.describe(stats_).c_str());
    } else {
      if (line != "/help") std::fprintf(stderr, "no command is named %s\n", line.c_str());
      std::fputs(
          "/clear   forget the conversation\n/save    write it to the file of --session (leaving does, too)\n"
          "/stats   speed of the last reply\n/quit    leave\n",
          stderr);
    }
    return true;
  }

  void say(const std::string& text) {
    std::vector<ChatMessage> messages = messages_;
    messages.push_back({"user", text});
    auto show = [](std::string_view piece) {
      std::fwrite(piece.data(), 1, piece.size(), stdout);
      std::fflush(stdout);
    };
    std::string reply = session_.reply(session_.prompt_of(messages), show, stats_);
    std::fputs("\n", stdout);
    if (interrupted() && reply.empty()) {
      std::fputs("(no reply: the line is left out)\n", stderr);
      return;
    }
    if (stats_.finish == Finish::length) std::fputs("(--max-tokens ended the reply)\n", stderr);
    if (stats_.finish == Finish::context_full) {
      std::fputs("(the context is full: /clear forgets the conversation, --ctx-size makes room)\n", stderr);
    }
    messages.push_back({"assistant", reply});
    messages_ = std::move(messages);
    if (options_.session.stats) std::fprintf(stderr, "%s\n", session_.describe(stats_).c_str());
  }

  ChatOptions options_;
  Session session_;
  std::vector<ChatMessage> messages_;
  GenerationStats stats_;
};

}  // namespace

void add_chat(CLI::App& app) {
  auto options = std::make_shared<ChatOptions>();
  CLI::App* command = app.add_subcommand("chat", "Talk to a model through its chat template");
  add_session_options(*command, options->session);
  command->add_option("--system", options->system, "System message");
  command->add_option("--session", options->session_file,
                      "Keep the conversation and its cache in this file, and go on with what it has");
  command->callback([options] { Chat(*options).run(); });
}

}  // namespace latente

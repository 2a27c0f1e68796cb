// latente generate: continues a prompt.
#include <unistd.h>

#include <cstdio>

#include "base/file.h"
#include "commands.h"
#include "session.h"

namespace latente {
namespace {

struct GenerateOptions {
  SessionOptions session;
  std::string prompt, prompt_file;
  bool no_echo = false;
};

void write_out(std::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

void generate(const GenerateOptions& options) {
  std::string prompt = options.prompt;
  if (!options.prompt_file.empty())
    prompt = read_file(options.prompt_file == "-" ? "/dev/stdin" : options.prompt_file);
  Session session(options.session);
  std::vector<int32_t> ids = session.tokenizer().encode(prompt);
  if (ids.empty()) {
    // An empty prompt writes from the beginning of a text, where the model has a token for that.
    std::optional<int32_t> begin =
        session.tokenizer().bos_id() ? session.tokenizer().bos_id() : session.tokenizer().eos_id();
    if (!begin) fail("the prompt is empty, and the tokenizer has no token that begins a text");
    ids.push_back(*begin);
  }
  if (!options.no_echo) write_out(prompt);
  GenerationStats stats;
  session.reply(ids, write_out, stats);
  write_out("\n");
  if (options.session.stats) std::fprintf(stderr, "\n%s\n", session.describe(stats).c_str());
}

}  // namespace

void add_generate(CLI::App& app) {
  auto options = std::make_shared<GenerateOptions>();
  CLI::App* command = app.add_subcommand("generate", "Continue a prompt");
  add_session_options(*command, options->session);
  auto* prompt = command->add_option("-p,--prompt", options->prompt, "Text to continue");
  command
      ->add_option("-f,--prompt-file", options->prompt_file,
                   "Read the prompt from a file; - = standard input")
      ->excludes(prompt);
  command->add_flag("--no-echo", options->no_echo, "Do not repeat the prompt");
  command->callback([options] { generate(*options); });
}

}  // namespace latente

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
  const std::vector<int32_t> ids = session.prompt_of(prompt);
  if (!options.no_echo) write_out(prompt);
  GenerationStats stats;
  try {
    session.reply(ids, write_out, stats);
  } catch (...) {
    write_out("\n");  // before the message
    throw;
  }
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

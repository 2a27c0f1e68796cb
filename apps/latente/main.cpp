#include <cstdio>
#include <exception>

#include "commands.h"
#include "device.h"

int main(int argc, char** argv) {
  CLI::App app{
      "Latente: DeepSeek-V3 in C++. Trains, converts, runs and looks into models of that architecture."};
  app.name("latente");
  app.set_version_flag("--version", latente::version_text());
  app.require_subcommand(1);
  app.failure_message(CLI::FailureMessage::help);
  latente::add_train(app);
  latente::add_generate(app);
  latente::add_chat(app);
  latente::add_batch(app);
  latente::add_serve(app);
  latente::add_inspect(app);
  latente::add_parity(app);
  latente::add_bench(app);
  latente::add_perplexity(app);
  latente::add_convert(app);
  latente::add_tokenizer(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp& help) {
    return app.exit(help);
  } catch (const CLI::CallForVersion& version) {
    return app.exit(version);
  } catch (const CLI::RuntimeError& status) {
    return status.get_exit_code();  // a command that ran and reports failure
  } catch (const CLI::ParseError& error) {
    if (app.get_subcommands().empty() && !app.remaining().empty()) {
      std::fprintf(stderr, "latente: no command is named %s (try --help)\n", app.remaining().front().c_str());
      return 1;
    }
    std::fprintf(stderr, "latente: %s (try --help)\n", error.what());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "latente: %s\n", error.what());
    return 1;
  }
  return 0;
}

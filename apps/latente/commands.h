// A file per subcommand; each adds itself to the command line.
#pragma once

#include <CLI/CLI.hpp>

namespace latente {

void add_inspect(CLI::App& app);
void add_parity(CLI::App& app);
void add_train(CLI::App& app);
void add_generate(CLI::App& app);
void add_chat(CLI::App& app);
void add_tokenizer(CLI::App& app);
void add_batch(CLI::App& app);
void add_serve(CLI::App& app);
void add_bench(CLI::App& app);
void add_perplexity(CLI::App& app);
void add_convert(CLI::App& app);

}  // namespace latente

// Which tokens may come next: the vocabulary's tree walked along a grammar's configurations.
//
// Most of the answer depends on the top of the stack alone. For each item of a configuration a walk with
// nothing known below it is done once a grammar (as XGrammar's context-independent tokens: Dong et al. 2024)
// and gives the tokens that stay inside of the rule, and the places in the tree where the rule can be left;
// only what lies below those is walked for the whole stack.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "grammar/configurations.h"
#include "grammar/vocabulary.h"

namespace latente::grammar {

// A set of tokens: a list while it is small, else a bit each.
class TokenSet {
 public:
  TokenSet() = default;
  explicit TokenSet(std::span<const uint64_t> mask);
  void add_to(std::span<uint64_t> mask) const;
  size_t memory_bytes() const {
    return tokens_.capacity() * sizeof(int32_t) + mask_.capacity() * sizeof(uint64_t);
  }

 private:
  std::vector<int32_t> tokens_;
  std::vector<uint64_t> mask_;
};

// A grammar over a vocabulary, compiled. Any number of threads may use one.
class TokenGrammar {
 public:
  TokenGrammar(std::shared_ptr<const Automaton> automaton, std::shared_ptr<const Vocabulary> vocabulary);

  const std::shared_ptr<const Automaton>& automaton() const { return automaton_; }
  const Vocabulary& vocabulary() const { return *vocabulary_; }

  // Adds the tokens whose whole text can be read from `configuration` to the mask. Memory may be collected
  // meanwhile, which changes the number of the configuration.
  void add_readable(Configurations& all, uint32_t& configuration, std::span<uint64_t> mask) const;

  // The same by walking the whole tree: where tops say too little.
  void walk_all(Configurations& all, uint32_t& configuration, std::span<uint64_t> mask) const;

 private:
  struct Top {  // what the top of a stack says
    TokenSet inside;
    std::vector<uint32_t> exits;  // nodes of the tree where it is left, with others below them
    uint64_t below_exits = 0;     // how many
    size_t memory_bytes() const { return inside.memory_bytes() + exits.capacity() * sizeof(uint32_t) + 128; }
  };
  struct Part {         // of the tree
    size_t begin, end;  // nodes
    size_t depth = 0;   // of the node above
    size_t beyond = 0;  // only those that texts of more bytes begin with
  };
  template <class Visit>
  void walk(Configurations& all, std::vector<uint32_t>& path, const Part& part, Visit visit) const;
  void add_tokens(size_t node, std::span<uint64_t> mask) const;
  // same, same_until: a top that this one equals for texts of up to as many bytes; or null. The result is
  // null when memory was collected meanwhile.
  std::shared_ptr<const Top> top(Configurations& all, uint32_t& configuration,
                                 const std::vector<uint32_t>& key, const Top* same, size_t same_until) const;
  std::shared_ptr<const Top> known_top(const std::vector<uint32_t>& key) const;
  void keep_top(const std::vector<uint32_t>& key, const std::shared_ptr<const Top>& made) const;
  std::shared_ptr<const Top> small_top(Configurations& all, uint32_t& configuration, const Item& item,
                                       uint32_t& below) const;

  void walk_whole(Configurations& all, uint32_t& configuration, std::span<uint64_t> mask) const;

  // For one mask: nodes of the tree that are visited, and what Configurations::work counts. Some 20 ns each.
  static constexpr uint64_t most_work = uint64_t{1} << 24;
  static constexpr size_t tops_memory = size_t{64} << 20;

  std::shared_ptr<const Automaton> automaton_;
  std::shared_ptr<const Vocabulary> vocabulary_;
  mutable std::mutex mutex_;
  mutable std::map<std::vector<uint32_t>, std::shared_ptr<const Top>> tops_;  // by Beginning::key
  mutable size_t tops_bytes_ = 0;
};

}  // namespace latente::grammar

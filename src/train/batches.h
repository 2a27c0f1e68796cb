// Sequences of equal length, cut from a corpus as one stream: the documents one after another, window w being
// the tokens from w·length on. Windows are shuffled anew in each epoch.
//
// All is a pure function of (corpus, options, position): a run resumes exactly from a saved position, and the
// global batch is the same windows in the same order for one rank as for many. A global batch runs on into
// the next epoch.
#pragma once

#include <cstdint>
#include <vector>

#include "base/fields.h"
#include "train/corpus.h"

namespace latente {

// Fill in the middle, prefix-suffix-middle (Bavarian et al., arXiv:2207.14255; DeepSeek-V3 report,
// section 4.1): each piece of a document in a window becomes, with probability `rate`, BEGIN prefix HOLE
// suffix END middle, cut at two random tokens. The three marks displace the last three tokens of the piece.
// This is the paper's context-level form: all parts lie in one window however long the document is.
struct FimOptions {
  double rate = 0;
  int begin = -1, hole = -1, end = -1;  // token ids
  int before = 0, after = 0;            // tokens around each document (BOS, EOS), which stay in place

  FIELDS(rate, begin, hole, end, before, after)
  bool operator==(const FimOptions&) const = default;
};

struct BatchOptions {
  int64_t length = 1024;  // tokens a sequence
  int depths = 0;         // further tokens predicted at each place (MTP modules)
  bool document_mask =
      false;  // attention and targets stay inside a document; false: as DeepSeek-V3 was trained
  bool shuffle = true;
  // For validation: every token but the first is a target once an epoch. The last window and the last batch
  // of the epoch are padded, instead of being left out and continued.
  bool keep_tail = false;
  int64_t seed = 1;
  int rank = 0, world = 1;  // this process takes the rank-th of `world` equal parts of each global batch
  FimOptions fim;

  FIELDS(length, depths, document_mask, shuffle, keep_tail, seed, rank, world, fim)
  bool operator==(const BatchOptions&) const = default;
};

// The next window to be taken, by all ranks together.
struct BatchPosition {
  int64_t epoch = 0, index = 0;

  FIELDS(epoch, index)
  bool operator==(const BatchPosition&) const = default;
};

// N = sequences · length places. Depth 0 is the model itself, depth k the k-th MTP module.
struct Batch {
  int64_t sequences = 0, length = 0;
  // [1 + depths][N]: inputs[k] is the token k places later, targets[k] the one k + 1 places later. A target
  // is −1 behind the end of the corpus and, with document_mask, in another document; padding is the input 0.
  std::vector<std::vector<int32_t>> inputs, targets;
  std::vector<int32_t> starts;         // [N]: the first place (of the N) that each place attends to
  std::vector<int64_t> lengths;        // [sequences]: places before the padding
  std::vector<int64_t> target_counts;  // [1 + depths]: targets that are not −1
  int64_t target_bytes = 0;            // of text that the targets of depth 0 stand for
};

class Batches {
 public:
  // token_bytes[id]: the bytes of text that a token stands for, 0 for special tokens; may be empty, and then
  // target_bytes stays 0. Error when the corpus has no window, or an option cannot be.
  Batches(Corpus corpus, const BatchOptions& options, std::vector<int32_t> token_bytes = {});

  const BatchOptions& options() const { return options_; }
  int64_t windows() const { return windows_; }  // in an epoch
  // Calls of next() that an epoch takes, the last one perhaps not wholly of it.
  int64_t batches(int64_t sequences) const;

  // The next `sequences` windows of this rank; the position moves on by sequences · world.
  void next(Batch& batch, int64_t sequences);

  BatchPosition position() const { return position_; }
  void seek(BatchPosition position);
  // Differs between corpora and options for which a position means other text.
  uint64_t fingerprint() const;

 private:
  int64_t window_at(int64_t epoch, int64_t index);
  void fill_row(Batch& batch, int64_t row, int64_t epoch, int64_t window);
  void fill_in_the_middle(int64_t epoch, int64_t window);

  Corpus corpus_;
  BatchOptions options_;
  std::vector<int32_t> token_bytes_;
  int64_t windows_ = 0;
  BatchPosition position_;
  int64_t ordered_epoch_ = -1;
  std::vector<int64_t> order_;                // of the windows in ordered_epoch_
  std::vector<int32_t> tokens_;               // of a row, with those to look ahead at
  std::vector<int64_t> documents_, offsets_;  // of each of them; offsets from the window's beginning
};

}  // namespace latente

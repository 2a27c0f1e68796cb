// Tokenizers of a few dozen tokens, one a kind in use: quick to load under sanitizers, and between them they
// have every part that tokenizer.json may name. Patterns with Unicode's large classes take milliseconds to
// compile, so most of these do without.
#pragma once

#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

struct SmallTokenizer {
  const char* parts;   // all but the model's vocabulary and merges
  const char* tokens;  // in order of their ids, with spaces between them
  const char* merges;  // left and right in turn
};

inline const SmallTokenizer small_tokenizers[] = {
    // One piece, spaces as characters, unknown characters as bytes (Llama 2).
    {R"({"added_tokens":[
{"id":0,"content":"<unk>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true},
{"id":1,"content":"<s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],
"normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"▁"},
{"type":"Replace","pattern":{"String":" "},"content":"▁"}]},"pre_tokenizer":null,
"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},
{"Sequence":{"id":"A","type_id":0}}],"special_tokens":{"<s>":{"id":"<s>","ids":[1],"tokens":["<s>"]}}},
"decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},
{"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},
"model":{"type":"BPE","unk_token":"<unk>","fuse_unk":true,"byte_fallback":true}})",
     "<unk> <s> ▁ t h e a b ▁t he ▁the ab <0x0A> <0x20> <0xC3> <0xA9> <0xE4> <0xB8> <0xAD>",
     "▁ t h e ▁t he a b"},
    // Bytes as characters (GPT-2), whole words before merges, added tokens with every flag.
    {R"({"added_tokens":[
{"id":20,"content":"<|end|>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true},
{"id":21,"content":"ab","single_word":true,"lstrip":true,"rstrip":false,"normalized":true,"special":false},
{"id":22,"content":" é","single_word":false,"lstrip":false,"rstrip":true,"normalized":true,"special":true}],
"normalizer":{"type":"NFC"},
"pre_tokenizer":{"type":"Sequence","pretokenizers":[
{"type":"Split","pattern":{"Regex":"[0-9]{1,3}|'s"},"behavior":"Isolated","invert":false},
{"type":"Split","pattern":{"String":"-"},"behavior":"MergedWithPrevious","invert":false},
{"type":"ByteLevel","add_prefix_space":true,"use_regex":false}]},
"post_processor":{"type":"ByteLevel"},"decoder":{"type":"ByteLevel"},
"model":{"ignore_merges":true}})",
     "a b Ġ Ċ t h e Ã © ä ¸ Ń 1 2 ab Ġt he Ġthe Ã© ä¸", "a b Ġ t h e Ġt he Ã © ä ¸"},
    // Words end in a suffix (CLIP).
    {R"({"added_tokens":[
{"id":0,"content":"<|s|>","single_word":false,"lstrip":false,"rstrip":false,"normalized":true,"special":true}],
"normalizer":{"type":"Sequence","normalizers":[{"type":"NFKC"},
{"type":"Replace","pattern":{"Regex":"\\s+"},"content":" "},{"type":"Lowercase"}]},
"pre_tokenizer":{"type":"Split","pattern":{"Regex":"(?i:<\\|s\\|>|'t|'re)|[a-z]+|[^\\sa-z]"},
"behavior":"Removed","invert":true},
"post_processor":{"type":"RobertaProcessing","sep":["<|s|>",0],"cls":["<|s|>",0]},
"decoder":{"type":"BPEDecoder","suffix":"</w>"},
"model":{"unk_token":"<|s|>","end_of_word_suffix":"</w>"}})",
     "<|s|> a b t h e a</w> b</w> e</w> ab</w> th the</w>", "a b</w> t h th e</w>"},
    // Words go on with a prefix (BERT).
    {R"({"normalizer":{"type":"Sequence","normalizers":[{"type":"NFD"},{"type":"StripAccents"},
{"type":"Strip","strip_left":true,"strip_right":true}]},
"pre_tokenizer":{"type":"CharDelimiterSplit","delimiter":" "},
"post_processor":{"type":"BertProcessing","sep":["x",0],"cls":["x",1]},
"decoder":{"type":"Replace","pattern":{"Regex":"^##|.$"},"content":""},
"model":{"unk_token":"?","fuse_unk":false,"continuing_subword_prefix":"##"}})",
     "? a b ##a ##b t ##h ##e ab th the", "a ##b t ##h th ##e"},
    // Pieces that begin with a mark (Metaspace), digits one by one, no unknown token.
    {R"({"normalizer":{"type":"NFKD"},"pre_tokenizer":{"type":"Sequence","pretokenizers":[
{"type":"Metaspace","replacement":"▁","prepend_scheme":"first","split":true},
{"type":"Digits","individual_digits":true}]},
"post_processor":{"type":"Sequence","processors":[{"type":"ByteLevel"}]},
"decoder":{"type":"Metaspace","replacement":"▁","prepend_scheme":"first"},
"model":{"byte_fallback":false}})",
     "▁ a b t h e 1 2 ▁a ▁t he ▁the", "▁ a ▁ t h e ▁t he"},
    // Whitespace and punctuation.
    {R"({"normalizer":{"type":"ByteLevel"},"pre_tokenizer":{"type":"Sequence","pretokenizers":[
{"type":"Punctuation","behavior":"Contiguous"},{"type":"WhitespaceSplit"}]},"model":{"unk_token":null}})",
     "a b . , Ġ Ã © ab ., Ã©", "a b . , Ã ©"},
};

inline std::vector<std::string> words_of(const char* text) {
  std::istringstream stream(text);
  std::vector<std::string> out;
  for (std::string word; stream >> word;) out.push_back(word);
  return out;
}

inline nlohmann::json json_of(const SmallTokenizer& tokenizer) {
  nlohmann::json out = nlohmann::json::parse(tokenizer.parts);
  nlohmann::json& model = out["model"];
  for (const std::string& token : words_of(tokenizer.tokens)) {
    const std::size_t id = model["vocab"].size();
    model["vocab"][token] = id;
  }
  const std::vector<std::string> merges = words_of(tokenizer.merges);
  for (std::size_t i = 0; i + 1 < merges.size(); i += 2) {
    // Both spellings.
    if (i % 4 == 0) {
      model["merges"].push_back(merges[i] + " " + merges[i + 1]);
    } else {
      model["merges"].push_back({merges[i], merges[i + 1]});
    }
  }
  return out;
}

#include "grammar/json_schema.h"

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "grammar/support.h"

namespace latente::grammar {
namespace {

using namespace test;
using Json = nlohmann::ordered_json;

std::shared_ptr<const Automaton> of_schema(std::string_view schema) {
  return compiled(parse_json_schema(schema));
}

// Random schemas and documents: what the Python package jsonschema says of them (record_cases.py).
TEST(JsonSchema, AgreesWithRecordedValidity) {
  std::ifstream file(LATENTE_TEST_DATA "/grammar/recorded/schemas.json");
  const Json cases = Json::parse(file);
  int64_t valid = 0, invalid = 0;
  for (const Json& one : cases) {
    const auto automaton = of_schema(one["schema"].get<std::string>());
    for (const Json& document : one["documents"]) {
      const bool want = document[1].get<bool>();
      EXPECT_EQ(matches(automaton, document[0].get<std::string>()), want)
          << one["schema"].get<std::string>() << "\n"
          << document[0].get<std::string>();
      (want ? valid : invalid) += 1;
    }
  }
  EXPECT_GT(valid, 800);
  EXPECT_GT(invalid, 1500);
}

struct Case {
  const char* schema;
  std::vector<std::string> valid, invalid;
};

TEST(JsonSchema, Keywords) {
  const std::vector<Case> cases = {
      {"{}",
       {"null", "[1, {\"a\":\"\\u00e9\\n\"}]", "-1.5e+3", "{}"},
       {"", " 1", "01", "1.", "[1,]", "\"\\ud800\"", "\"\n\""}},
      {"true", {"[]"}, {"[ \n\n]", "[  ]", "[1,  2]"}},
      {"{\"type\":\"array\"}", {"[ ]", "[\n  1,\n  2\n]", "[1,2]"}, {"[\n                      1]", "{}"}},
      {R"({"type":"object","properties":{"a":{"type":"integer"},"b":{},"c":{"type":"null"}},"required":["b"]})",
       {R"({"b":1})", R"({"a":1,"b":2,"c":null})", R"({"a": 1, "b": [], "c": null})", R"({ "b":"" })"},
       {R"({})", R"({"a":1})", R"({"b":1,"a":1})", R"({"b":1,})", R"({,"b":1})", R"({"b":1 ,"c":null})",
        R"({"b":1,"d":1})"}},
      {R"({"properties":{"ab":{"type":"integer"},"ac":false},"additionalProperties":{"type":"string"}})",
       {R"({"ab":1,"x":"","a":"","abc":"","":"","\\":"","\n":""})", "{}"},
       {R"({"x":"","ab":1})", R"({"ab":""})", R"({"a\u0062":""})", R"({"ac":""})", R"({"x":1})"}},
      {R"({"type":"integer","minimum":-12,"exclusiveMaximum":105})",
       {"-12", "-1", "0", "9", "99", "100", "104"},
       {"-13", "105", "007", "-0", "1.0", "1000"}},
      {R"({"type":"integer","minimum":5})", {"5", "10", "123456789"}, {"4", "-5", "0"}},
      {R"({"type":"integer","maximum":-3})", {"-3", "-10", "-99999"}, {"-2", "0", "3"}},
      {R"({"type":"integer","minimum":2.5,"maximum":3.5})", {"3"}, {"2", "4"}},
      {R"({"type":"number","minimum":0,"maximum":1})",
       {"0", "1", "0.5", "1.000", "0.000"},
       {"1.01", "-0.1", "2", "1e0"}},
      {R"({"type":"number","exclusiveMinimum":-0.25,"exclusiveMaximum":1.5})",
       {"-0.24999", "-0.0001", "0", "1.4999", "1"},
       {"-0.25", "-0.250", "1.5", "1.50", "-0.3", "2"}},
      {R"({"minimum":3,"exclusiveMinimum":true,"type":"integer"})", {"4"}, {"3"}},
      {R"({"type":"string","minLength":1,"maxLength":2})",
       {"\"a\"", "\"é😀\"", R"("\n\u00e9")", R"("\ud83d\ude00x")"},
       {"\"\"", "\"abc\"", R"("\ud83dab")"}},
      {R"({"type":"string","pattern":"^a.c$"})",
       {"\"abc\"", R"("a\"c")", R"("a\\c")"},
       {"\"ac\"", "\"xabc\"", R"("a\nc")", "\"a\"c\""}},
      {R"({"type":"string","pattern":"b"})", {"\"b\"", R"("\u0041b\n")"}, {"\"\"", "\"a\""}},
      {R"({"type":"string","pattern":"^[\\d\\s]+$"})", {"\"1 2\\t\""}, {"\"a\""}},
      {R"({"format":"date"})",
       {"\"2024-02-29\"", "\"2000-02-29\"", "\"1999-12-31\""},
       {"\"2023-02-29\"", "\"1900-02-29\"", "\"2024-13-01\"", "\"0000-01-01\"", "\"2024-04-31\""}},
      {R"({"format":"time"})", {"\"23:59:59Z\"", "\"00:00:00.25+01:30\""}, {"\"24:00:00Z\"", "\"12:00:00\""}},
      {R"({"format":"date-time"})",
       {"\"2024-02-29T12:00:00Z\""},
       {"\"2024-02-29\"", "\"2024-02-29 12:00:00Z\""}},
      {R"({"format":"email"})",
       {"\"a.b+c@example.org\""},
       {"\"a@b\"", "\"@example.org\"", "\"a b@example.org\""}},
      {R"({"enum":[1,"a",null,{"k":[1,2]}]})",
       {"1", "\"a\"", "null", R"({"k": [1, 2]})", R"({"k":[1,2]})"},
       {"2", "\"b\"", R"({"k":[1]})"}},
      {R"({"type":"string","enum":["a","bb",3],"maxLength":1})", {"\"a\""}, {"\"bb\"", "3"}},
      {R"({"const":"é\"\n"})", {R"("é\"\n")"}, {"\"é\""}},
      {R"({"type":["integer","null"]})", {"1", "null"}, {"1.5", "\"\""}},
      {R"({"prefixItems":[{"type":"integer"},{"type":"string"}],"items":false})",
       {"[]", "[1]", "[1,\"\"]"},
       {"[\"\"]", "[1,\"\",1]"}},
      // Items of one schema, named by their place in another.
      {R"({"allOf":[{"prefixItems":[{"enum":[1,"a"]}]},{"items":{"type":["integer","null"]}}]})",
       {"[]", "[1]", "[1,null]"},
       {"[\"a\"]", "[null]", "[1,\"a\"]"}},
      {R"({"allOf":[{"prefixItems":[{"type":"object"}]},{"type":"array","items":{"type":"null"}}]})",
       {"[]"},
       {"[{}]", "[null]"}},
      {R"({"allOf":[{"prefixItems":[true,{"const":2}],"items":{"type":"integer"}},{"prefixItems":[{"const":1}],"items":{"minimum":2}}]})",
       {"[]", "[1]", "[1,2]", "[1,2,3]"},
       {"[2]", "[1,3]", "[1,2,1]", "[1,2,\"\"]"}},
      {R"({"items":[{"type":"integer"}],"additionalItems":{"type":"null"},"minItems":2})",
       {"[1,null]", "[1,null,null]"},
       {"[1]", "[1,1]"}},
      {R"({"type":"array","items":{"const":0},"minItems":2,"maxItems":3})",
       {"[0,0]", "[0,0,0]"},
       {"[]", "[0]", "[0,0,0,0]"}},
      {R"({"type":"array","maxItems":0})", {"[]"}, {"[1]"}},
      {R"({"anyOf":[{"type":"integer"},{"$ref":"#/$defs/t"}],"$defs":{"t":{"type":"array","items":{"$ref":"#"}}}})",
       {"1", "[]", "[1,[[2]]]"},
       {"[null]", "null"}},
      {R"({"allOf":[{"properties":{"a":{"type":"integer"}}},{"properties":{"a":{"minimum":3},"b":{"const":1}},"required":["a"]}]})",
       {R"({"a":3})", R"({"a":4,"b":1})"},
       {R"({"a":2})", R"({"b":1})", "{}"}},
      {R"({"type":"object","properties":{"k":{"enum":["x","y"]}},"required":["k"],"anyOf":[{"properties":{"k":{"const":"x"},"x":{}},"required":["x"]},{"properties":{"k":{"const":"y"}}}]})",
       {R"({"k":"x","x":1})", R"({"k":"y"})"},
       {R"({"k":"x"})", R"({"k":"y","x":1})"}},
      {R"({"$ref":"#/definitions/a~1b%25","definitions":{"a/b%":{"type":"null"}}})", {"null"}, {"1"}},
      {R"({"type":"object","maxProperties":2,"minProperties":1})",
       {R"({"a":1})", R"({"a":1,"b":2})"},
       {"{}", R"({"a":1,"b":2,"c":3})"}},
      {R"({"type":"object","required":["z"]})", {R"({"z":1,"y":2})", R"({"z":[]})"}, {R"({"y":2})", "{}"}},
      // Several things of one string at once.
      {R"({"type":"string","minLength":2,"maxLength":3,"pattern":"^[a-c\"]+$"})",
       {"\"ab\"", R"("a\"c")", "\"cba\""},
       {"\"a\"", "\"abca\"", "\"ad\""}},
      {R"({"type":"string","maxLength":3,"pattern":"é"})", {"\"éab\"", "\"😀é\""}, {"\"abcé\"", "\"ab\""}},
      {R"({"allOf":[{"pattern":"^a"},{"pattern":"b$"},{"minLength":3}],"type":"string"})",
       {"\"acb\"", "\"a\\nb\""},
       {"\"ab\"", "\"bca\""}},
      {R"({"format":"date","pattern":"^2024-.*-29$"})",
       {"\"2024-02-29\""},
       {"\"2023-01-29\"", "\"2024-02-30\""}},
      {R"({"format":"ipv6"})",
       {"\"::\"", "\"1:2:3:4:5:6:7:8\"", "\"fe80::1\"", "\"::ffff:1.2.3.4\"", "\"1::8\"",
        "\"1:2:3:4:5:6:7::\""},
       {"\":\"", "\"1:2:3:4:5:6:7\"", "\"1::2::3\"", "\"12345::\"", "\"1:2:3:4:5:6:7:8:9\"",
        "\"::1.2.3.256\""}},
      {R"({"format":"duration"})",
       {"\"P1Y2M3DT4H5M6S\"", "\"PT0S\"", "\"P2W\""},
       {"\"P\"", "\"PT\"", "\"P1S\"", "\"1D\""}},
      {R"({"format":"hostname"})",
       {"\"a\"", "\"www.example-1.org\""},
       {"\"-a\"", "\"a-\"", "\"a..b\"", "\"\""}},
      {R"({"format":"uri"})",
       {"\"https://example.org:80/a%20b?q=1#x\"", "\"urn:isbn:1\"", "\"mailto:a@b.org\""},
       {"\"example.org\"", "\"http://a b\"", "\"http:\"", "\"a:/%zz\""}},
      // Multiples.
      {R"({"type":"integer","multipleOf":7})", {"0", "7", "-14", "700"}, {"1", "8", "-15", "07", "7.0"}},
      {R"({"type":"integer","multipleOf":5,"minimum":-7,"maximum":12})",
       {"-5", "0", "10"},
       {"-10", "15", "12", "3"}},
      {R"({"type":"integer","multipleOf":2.5})", {"5", "-10"}, {"2", "12"}},
      {R"({"type":"number","multipleOf":0.01})",
       {"1", "0.1", "-3.25", "19.990", "0.00"},
       {"0.001", "1e2", ".5", "1.", "2.125"}},
      {R"({"type":"number","multipleOf":0.25,"exclusiveMinimum":1,"maximum":2})",
       {"1.25", "1.50", "2", "2.0"},
       {"1", "1.1", "2.25"}},
      {R"({"allOf":[{"multipleOf":4},{"multipleOf":6}],"type":"integer"})", {"12", "-24"}, {"4", "6", "18"}},
      // Not, conditions and dependencies.
      {R"({"type":"string","not":{"enum":["a","bc",1]}})",
       {"\"\"", "\"ab\"", "\"b\""},
       {"\"a\"", R"("\u0061")", "\"bc\""}},
      {R"({"type":"string","minLength":1,"not":{"const":"a\n"}})",
       {"\"a\"", "\"b\\n\""},
       {"\"a\\n\"", "\"\""}},
      {R"({"type":"string","not":{"pattern":"^S_"}})",
       {"\"S\"", "\"xS_\"", "\"\""},
       {"\"S_\"", "\"S_x\"", R"("\u0053_")"}},
      {R"({"type":"integer","not":{"const":3}})", {"2", "4", "-3", "33"}, {"3"}},
      {R"({"not":{"type":["object","array","number"]}})", {"\"\"", "null", "true"}, {"{}", "[]", "1"}},
      {R"({"type":["integer","null"],"not":{"anyOf":[{"minimum":5},{"type":"null"}]}})",
       {"4", "-1"},
       {"5", "null"}},
      {R"({"type":"object","properties":{"a":{},"b":{}},"not":{"required":["a","b"]}})",
       {"{}", R"({"a":1})", R"({"b":1})"},
       {R"({"a":1,"b":1})", R"({"c":1})"}},
      {R"({"type":"object","not":{"required":["a"]}})", {"{}", R"({"b":1})"}, {R"({"a":1})"}},
      {R"({"type":"object","properties":{"kind":{"enum":["circle","box"]},"r":{"type":"integer"},"w":{"type":"integer"}},
           "required":["kind"],"if":{"properties":{"kind":{"const":"circle"}}},"then":{"required":["r"]},"else":{"required":["w"]}})",
       {R"({"kind":"circle","r":1})", R"({"kind":"box","w":2})", R"({"kind":"box","r":1,"w":2})"},
       {R"({"kind":"circle"})", R"({"kind":"circle","w":1})", R"({"kind":"box","r":1})"}},
      {R"({"type":"integer","if":{"minimum":10},"then":{"multipleOf":10}})",
       {"3", "10", "-7", "120"},
       {"11", "15"}},
      {R"({"type":"object","properties":{"card":{"type":"integer"},"address":{"type":"string"}},"dependentRequired":{"card":["address"]}})",
       {"{}", R"({"address":""})", R"({"card":1,"address":""})"},
       {R"({"card":1})"}},
      {R"({"type":"object","properties":{"a":{"type":"integer"},"b":{}},"dependentSchemas":{"b":{"properties":{"a":{"minimum":5}},"required":["a"]}}})",
       {R"({"a":1})", R"({"a":5,"b":0})"},
       {R"({"a":4,"b":0})", R"({"b":0})"}},
      // Keys by patterns.
      {R"({"type":"object","properties":{"S_a":{},"n":{"type":"null"}},"patternProperties":{"^S_":{"type":"string"},"_i$":{"type":"integer"}},"additionalProperties":false})",
       {"{}", R"({"S_a":"","n":null,"S_x":"","x_i":1})", R"({"S_":"","_i":0})"},
       {R"({"S_a":1})", R"({"S_x":1})", R"({"x":1})", R"({"x_i":""})", R"({"S_x_i":1})", R"({"S_x_i":""})",
        R"({"\u0053_x":1})"}},
      {R"({"type":"object","patternProperties":{"^[a-z]+$":{"type":"integer"}},"additionalProperties":{"type":"boolean"},"required":["q","Q"]})",
       {R"({"q":1,"Q":true,"A":false,"z":0,"":true})"},
       {R"({"q":true,"Q":true})", R"({"q":1,"Q":1})", R"({"q":1,"Q":true,"a":true})"}},
      {R"({"type":"object","patternProperties":{"^x-":true}})", {"{}", R"({"x-a":[]})"}, {R"({"y":1})"}},
      // Sets.
      {R"({"type":"array","items":{"enum":["a","b",3]},"uniqueItems":true})",
       {"[]", R"(["b","a"])", R"([3, "b", "a"])"},
       {R"(["a","a"])", R"(["a",3,"a"])", R"([1])", R"(["a",])"}},
      {R"({"type":"array","items":{"type":"string","enum":["a","b","c"]},"uniqueItems":true,"minItems":1,"maxItems":2})",
       {R"(["c"])", R"(["c","a"])"},
       {"[]", R"(["a","b","c"])", R"(["b","b"])"}},
      {R"({"type":"array","uniqueItems":true,"maxItems":1})", {"[]", "[1]"}, {"[1,2]"}},
      {R"({"type":"array","contains":{"type":"integer"}})",
       {"[1]", R"(["a",1])", R"([1,"a"])", R"(["a",1,"b",2])", "[1,2,3]"},
       {"[]", R"(["a"])", "[1.5]", "1"}},
      {R"({"type":"array","items":{"enum":["a","b"]},"contains":{"const":"b"},"minContains":2})",
       {R"(["b","b"])", R"(["a","b","a","b","a"])", R"(["b","b","b"])"},
       {"[]", R"(["b"])", R"(["a","b"])", R"(["b","b","c"])"}},
      {R"({"type":"array","items":{"enum":["a","b"]},"contains":{"const":"b"},"minContains":0,"maxContains":1})",
       {"[]", R"(["a"])", R"(["b"])", R"(["a","b","a"])", R"(["a","a"])"},
       {R"(["b","b"])", R"(["b","a","b"])", R"(["c"])"}},
      {R"({"type":"array","items":{"enum":["a","b"]},"contains":{"const":"b"},"maxContains":2})",
       {R"(["b"])", R"(["b","a","b"])", R"(["a","b","b","a"])"},
       {"[]", R"(["a"])", R"(["b","b","b"])"}},
      {R"({"type":"array","items":{"enum":["a","b"]},"contains":{"const":"b"},"maxContains":0,"minContains":0})",
       {"[]", R"(["a","a"])"},
       {R"(["b"])", R"(["a","b"])"}},
      {R"({"items":{"enum":["a","b"]},"contains":{"const":"b"},"minItems":2,"maxItems":3,"maxContains":2,"type":"array"})",
       {R"(["a","b"])", R"(["b","b"])", R"(["a","a","b"])", R"(["a","b","b"])"},
       {R"(["b"])", R"(["b","b","b"])", R"(["a","a"])", R"(["a","a","a","b"])"}},
      {R"({"type":"array","contains":{"type":"integer"},"minItems":3})",
       {R"(["a","b",1])", "[1,2,3]"},
       {R"(["a",1])", R"(["a","b","c"])"}},
      {R"({"type":"array","contains":{"type":"integer"},"minContains":0})", {"[]", R"(["a"])"}, {"1"}},
      {R"({"allOf":[{"type":"array","contains":{"const":1}},{"contains":{"const":1},"minContains":0}]})",
       {"[1]", "[2,1]"},
       {"[]", "[2]"}},
  };
  for (const Case& one : cases) {
    const auto automaton = of_schema(one.schema);
    for (const std::string& text : one.valid)
      EXPECT_TRUE(matches(automaton, text)) << one.schema << "\n" << text;
    for (const std::string& text : one.invalid)
      EXPECT_FALSE(matches(automaton, text)) << one.schema << "\n" << text;
  }
}

TEST(JsonSchema, ErrorsNameThePath) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"{", "s: not JSON: "},
      {"[]", "s#: expected a schema: an object, true or false"},
      {R"({"properties":{"a":{"unevaluatedItems":false}}})",
       "s#/properties/a/unevaluatedItems: this keyword cannot be honoured"},
      {R"({"prefixItems":[{}],"contains":{}})", "s#/contains: cannot be honoured beside prefixItems"},
      {R"({"contains":{},"minContains":65})", "s#/contains: can be honoured up to a count of 64"},
      {R"({"contains":{"items":{}},"maxContains":1})",
       "s#/contains/not/items: this keyword cannot be honoured inside not"},
      {R"({"allOf":[{"contains":{"const":1}},{"contains":{"const":2}}]})",
       "s#/contains: two values that cannot be combined"},
      {R"({"type":"array","uniqueItems":true})",
       "s#/uniqueItems: can be honoured of lists of enumerated values"},
      {R"({"type":"array","uniqueItems":true,"items":{"enum":[0,1,2,3,4,5,6,7,8,9,10]}})",
       "s#/uniqueItems: can be honoured of at most 10 values, found 11"},
      {R"({"patternProperties":[]})", "s#/patternProperties: expected an object"},
      {R"({"patternProperties":{"(":{}}})", "s#/patternProperties/(: at character 2 of the pattern: "},
      {R"({"allOf":[{"patternProperties":{"a":{}}},{"properties":{"a":{}}}]})",
       "s#/patternProperties: cannot be combined with the properties of another schema"},
      {R"({"not":{"format":"date"}})", "s#/not/format: this keyword cannot be honoured inside not"},
      {R"({"not":{"enum":[[1]]}})", "s#/not/enum: a list or an object cannot be honoured inside not"},
      {R"({"if":{"items":{}}})",
       "s#/if/items: this keyword cannot be honoured inside not, or in a condition"},
      {R"({"type":"string","pattern":"b","maxLength":1000000})", "s#: "},
      {R"({"type":"strnig"})", "s#/type: expected the name of a type or a list of such, found \"strnig\""},
      {R"({"minLength":-1})", "s#/minLength: expected a whole number"},
      {R"({"properties":[]})", "s#/properties: expected an object"},
      {R"({"format":"iri"})", "s#/format: expected one of date, date-time"},
      {R"({"type":"integer","multipleOf":0})", "s#/multipleOf: expected a number above 0, found 0"},
      {R"({"type":"integer","multipleOf":12345})", "s#/multipleOf: expected a step of at most 3000"},
      {R"({"$ref":"#/$defs/x"})", "s#/$ref: the schema has no #/$defs/x"},
      {R"({"$ref":"http://example.org/x"})", "s#/$ref: only references into the schema itself"},
      {R"({"allOf":[{"$ref":"#"}]})", "s#/allOf/0/$ref"},
      {R"s({"properties":{"a/b":{"pattern":"(?=x)"}}})s",
       "s#/properties/a~1b/pattern: at character 3 of the pattern: look-around"},
      {R"({"pattern":"(a"})", "s#/pattern: at character 3 of the pattern: a ( without its )"},
      {R"({"pattern":"a\\1"})", "s#/pattern: at character 3 of the pattern: back references"},
      {R"s({"pattern":"(^a)"})s", "s#/pattern: at character 2 of the pattern: ^ is understood"},
      {R"({"required":["a"],"additionalProperties":false})",
       "s#/required: additionalProperties forbids \"a\""},
      {R"({"properties":{"a":{}},"minProperties":1})", "s#/minProperties: cannot be honoured here"},
      {R"({"enum":[{}],"properties":{"a":{"$ref":"#"}}})",
       "s#: enum or const beside what cannot be honoured"},
      {std::string(500, '['), "s: nests deeper than 128"},
  };
  for (const auto& [schema, message] : cases) {
    try {
      compiled(parse_json_schema(schema, "s"));
      ADD_FAILURE() << schema << " is accepted";
    } catch (const Error& error) {
      const std::string what = error.what();
      EXPECT_TRUE(what.starts_with(message) ||
                  (message.ends_with("$ref") && what.find("circles") != what.npos))
          << what;
    }
  }
  EXPECT_THROW(of_schema("false"), Error);
  EXPECT_THROW(of_schema(R"({"$ref":"#"})"), Error);
  EXPECT_THROW(of_schema(R"({"enum":[]})"), Error);
}

// Small schemas of which a naive compiler makes very much.
TEST(JsonSchema, RefusesWhatNeedsTooMuchWork) {
  const auto expect_refused = [](const Json& schema, std::string_view path, std::string_view what) {
    try {
      parse_json_schema(schema.dump(), "s");
      ADD_FAILURE() << schema.dump().substr(0, 200) << " is accepted";
    } catch (const Error& error) {
      const std::string message = error.what();
      EXPECT_TRUE(message.starts_with(path)) << message;
      EXPECT_NE(message.find(what), message.npos) << message;
    }
  };
  const std::string steps = "more than 8388608 steps are needed to compile it";
  // Keys may match any of the patterns, at any place.
  Json patterns;
  for (const char* word : {"dependentRequired", "else", "if", "properties", "then", "type"})
    patterns["patternProperties"][word] = {{"type", "integer"}};
  expect_refused(patterns, "s#/patternProperties: ", steps);
  // Each definition stands for two of the next.
  Json doubled = {{"$ref", "#/$defs/0"}, {"title", ""}};
  for (int i = 0; i < 30; ++i) {
    const Json next = {{"$ref", "#/$defs/" + std::to_string(i + 1)}};
    doubled["$defs"][std::to_string(i)] = {{"allOf", {next, next}}};
  }
  doubled["$defs"]["30"] = {{"type", "integer"}};
  expect_refused(doubled, "s#/$ref/allOf/0/", steps);
  std::string members = R"({"properties":{)";
  for (int i = 0; i < 20'000; ++i) members += (i > 0 ? ",\"" : "\"") + std::to_string(i) + R"(":{})";
  try {
    parse_json_schema(members + "}}", "s");
    ADD_FAILURE() << "20'000 properties are accepted";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "s: objects of too many members, 16385 in one of them");
  }
  Json required;
  for (int i = 0; i < 100'000; ++i) required["required"].push_back("r" + std::to_string(i));
  expect_refused(required, "s#/required: ", steps);

  // What is large, but not that large, is compiled.
  Json common;
  for (int i = 0; i < 2000; ++i) common["properties"]["k" + std::to_string(i)] = {{"type", "string"}};
  for (int i = 0; i < 30; ++i) {
    common["properties"]["p" + std::to_string(i)] = {
        {"type", "string"}, {"pattern", "^[a-z_-]+" + std::to_string(i) + "?$"}, {"maxLength", 100}};
  }
  common["additionalProperties"] = false;
  EXPECT_GT(of_schema(common.dump())->states(), 10'000u);
}

// Walks through documents by admitted tokens alone: whatever is written parses, and every prefix goes on.
TEST(JsonSchema, WhatIsWrittenParses) {
  std::vector<std::string> tokens{""};
  for (int c = 1; c < 256; ++c) tokens.push_back(std::string(1, static_cast<char>(c)));
  for (const char* text : {"{\"",  "\":", "\",",  "\"}",   "},{",       "}}", "]]",   "[[",    "true",
                           "null", ": ",  ", \"", "\\u00", "12",        "-1", "\n  ", "\":\"", "abc",
                           "\\\"", "é",   "中文", "name",  "\"name\":", "0.", "e+"})
    tokens.emplace_back(text);
  const auto vocabulary = std::make_shared<Vocabulary>(tokens, std::vector<int32_t>{0});
  const char* const schemas[] = {
      "{}", R"({"type":"object"})",
      R"({"type":"object","properties":{"name":{"type":"string","maxLength":5},"n":{"type":"array","items":{"type":"integer","minimum":0,"maximum":120}}},"required":["name"]})",
      R"({"properties":{"next":{"$ref":"#"},"v":{"type":"number"}},"required":["v"],"additionalProperties":{"type":"boolean"}})"};
  int64_t ended = 0;
  for (const char* schema : schemas) {
    const auto grammar = std::make_shared<TokenGrammar>(of_schema(schema), vocabulary);
    for (uint64_t seed = 0; seed < 40; ++seed) {
      Random random(seed);
      Matcher matcher(grammar);
      std::vector<uint64_t> mask(vocabulary->words());
      std::string text;
      for (int step = 0; step < 400 && !matcher.finished(); ++step) {
        matcher.admitted(mask);
        std::vector<int32_t> next;
        for (int32_t token = 0; token < static_cast<int32_t>(tokens.size()); ++token) {
          if (!admits(mask, token)) continue;
          // Closing is likely, so that walks end.
          const std::string& piece = tokens[static_cast<size_t>(token)];
          next.insert(next.end(), token == 0 || piece.find_first_of("}]\"") != piece.npos ? 12 : 1, token);
        }
        ASSERT_FALSE(next.empty()) << schema << "\n" << text;
        const int32_t token = next[random.below(next.size())];
        ASSERT_TRUE(matcher.accept(token));
        text += tokens[static_cast<size_t>(token)];
      }
      if (!matcher.finished()) continue;
      ++ended;
      EXPECT_FALSE(Json::parse(text, nullptr, false).is_discarded()) << text;
    }
  }
  EXPECT_GT(ended, 60);
}

}  // namespace
}  // namespace latente::grammar

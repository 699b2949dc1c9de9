// Utf8Gate and StopMatcher: streamed text never splits a character and never has to be taken back.
#include <m2lm/m2lm.hpp>

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <support/environment.hpp>

#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

namespace {

using m2lm::Rng;
using m2lm::StopMatcher;
using m2lm::Utf8Gate;

std::string from_hex(const std::string& hex) {
  std::string out;
  for (std::size_t i = 0; i < hex.size(); i += 2) out += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  return out;
}

StopMatcher matcher(const std::vector<std::string>& strings) { return StopMatcher({}, strings); }

/// What comes of the pieces, each output in brackets; "!" marks the stop.
std::string run(StopMatcher& m, const std::vector<std::string>& pieces) {
  std::string out;
  for (const std::string& piece : pieces) {
    const auto o = m.push(piece);
    out += "[" + std::string(o.text) + "]";
    if (o.stopped) return out + "!";
  }
  return out + "(" + std::string(m.finish()) + ")";
}
std::string run(const std::vector<std::string>& strings, const std::vector<std::string>& pieces) {
  auto m = matcher(strings);
  return run(m, pieces);
}

/// Definition of the text before a stop, one byte at a time over the whole text.
std::string before_stop(const std::string& text, const std::vector<std::string>& strings, bool& stopped) {
  stopped = true;
  for (std::size_t end = 1; end <= text.size(); ++end) {
    std::size_t longest = 0;
    for (const std::string& s : strings)
      if (s.size() <= end && s.size() > longest && text.compare(end - s.size(), s.size(), s) == 0) longest = s.size();
    if (longest) return text.substr(0, end - longest);
  }
  stopped = false;
  return text;
}

bool whole_characters(std::string_view text) {
  Utf8Gate gate;
  return std::string(gate.push(text)) == text && gate.finish().empty();
}

}  // namespace

TEST_CASE("damaged UTF-8 decodes as in Python, however it is cut") {
  std::ifstream file(m2lm_test::source_file("tests/golden/sampling/sampling.json"));
  REQUIRE(file.good());
  const auto cases = nlohmann::json::parse(file)["utf8"];
  CHECK(cases.size() >= 50);
  Rng rng(5);
  for (const auto& c : cases) {
    const std::string bytes = from_hex(c["bytes"]), expected = from_hex(c["text"]);
    CAPTURE(c["bytes"].get<std::string>());
    for (int trial = 0; trial < 8; ++trial) {
      Utf8Gate gate;
      std::string text;
      for (std::size_t at = 0; at < bytes.size();) {
        const std::size_t n = trial == 0 ? bytes.size() : trial == 1 ? 1 : rng.next() % 4;
        const std::string piece(gate.push(bytes.substr(at, n)));
        CHECK(whole_characters(piece));
        text += piece;
        at += n;
      }
      text += gate.finish();
      CHECK(text == expected);
      CHECK(gate.finish().empty());
      CHECK(gate.push("x") == "x");  // as new
    }
  }
}

TEST_CASE("a character is emitted when its last byte has come") {
  Utf8Gate gate;
  CHECK(gate.push("a\xF0") == "a");
  CHECK(gate.push("\x9F") == "");
  CHECK(gate.push("\x91") == "");
  CHECK(gate.push("\x8D"
                  "b") ==
        "\xF0\x9F\x91\x8D"
        "b");
  CHECK(gate.push("\xE2\x82") == "");
  CHECK(gate.push("\xAC") == "\xE2\x82\xAC");
  CHECK(gate.push("\xC3") == "");
  CHECK(gate.finish() == "\xEF\xBF\xBD");
}

TEST_CASE("text that may begin a stop string is held back") {
  CHECK(run({"</s>"}, {"A cat.", "<", "/", "s", ">", "never"}) == "[A cat.][][][][]!");
  CHECK(run({"</s>"}, {"a <", "b> ", "</", "t"}) == "[a ][<b> ][][</t]()");
  CHECK(run({"</s>"}, {"A", "</s"}) == "[A][](</s)");  // the end comes first: nothing is lost
  CHECK(run({"</s>"}, {"x</s>y"}) == "[x]!");
  CHECK(run({"ab"}, {"a", "a", "a", "b"}) == "[][a][a][]!");
  CHECK(run({"aab"}, {"aaa", "ab"}) == "[a][a]!");
  CHECK(run({}, {"", "a", "b"}) == "[][a][b]()");
  CHECK(run({"a"}, {"", "b", "a"}) == "[][b][]!");
  CHECK(run({"stop"}, {"st", "", "op"}) == "[][][]!");
}

TEST_CASE("overlapping stop strings: the one that is complete first ends the text, of equals the longest") {
  CHECK(run({"abcd", "c"}, {"xab", "cd"}) == "[x][ab]!");
  CHECK(run({"abcd", "c"}, {"xabcd"}) == "[xab]!");
  CHECK(run({"c", "bc", "abc"}, {"xabc"}) == "[x]!");
  CHECK(run({"c", "bc", "abc"}, {"xa", "b", "c"}) == "[x][][]!");
  CHECK(run({"\n\n", "\nUSER:"}, {"hi\n", "USER", " says"}) == "[hi][][\nUSER says]()");
  CHECK(run({"\n\n", "\nUSER:"}, {"hi\n", "USER", ":"}) == "[hi][][]!");
  CHECK(run({"\n\n", "\nUSER:"}, {"hi\n", "\n"}) == "[hi][]!");
}

TEST_CASE("stop strings of several bytes per character keep characters whole") {
  CHECK(run({"。おわり"}, {"はい。", "お", "と"}) == "[はい][][。おと]()");
  CHECK(run({"。おわり"}, {"はい。", "おわ", "り。"}) == "[はい][][]!");
  CHECK(run({"é!"}, {"caf", "é", "!"}) == "[caf][][]!");
  CHECK(run({"é!"}, {"caf", "é", "?"}) == "[caf][][é?]()");
}

TEST_CASE("the text does not depend on the pieces, and nothing emitted is ever part of the stop string") {
  Rng rng(99);
  const std::vector<std::vector<std::string>> sets{{"ab", "ba"}, {"aba", "bb"},         {"abab", "b"}, {"aabaa"},
                                                   {"é", "aé"},  {"abb", "bba", "aaa"}, {"ab。"}};
  const std::vector<std::string> letters{"a", "b", "é", "。"};
  for (int trial = 0; trial < 3000; ++trial) {
    const auto& strings = sets[rng.next() % sets.size()];
    std::string text;
    for (std::uint64_t n = rng.next() % 14; n > 0; --n) text += letters[rng.next() % 8 < 6 ? rng.next() % 2 : rng.next() % 4];
    bool stops = false;
    const std::string expected = before_stop(text, strings, stops);
    auto m = matcher(strings);
    Utf8Gate gate;
    std::string shown;
    bool stopped = false;
    for (std::size_t at = 0; at < text.size() && !stopped;) {
      const std::size_t n = 1 + rng.next() % 5;
      const auto o = m.push(gate.push(text.substr(at, n)));
      CHECK(whole_characters(o.text));
      shown += o.text;
      CHECK(expected.starts_with(shown));
      stopped = o.stopped;
      at += n;
    }
    if (!stopped) shown += m.finish();
    CAPTURE(text);
    CHECK(stopped == stops);
    CHECK(shown == expected);
  }
}

TEST_CASE("after a stop there is no more text until reset") {
  auto m = matcher({"."});
  CHECK(run(m, {"one.two"}) == "[one]!");
  CHECK(m.push("more").text.empty());
  CHECK(m.push("more").stopped);
  CHECK(m.finish().empty());
  m.reset();
  CHECK(run(m, {"two", "."}) == "[two][]!");
}

TEST_CASE("stop tokens and stop strings that cannot be used") {
  const std::vector<std::int32_t> ids{2, 32000};
  const StopMatcher m(ids, {});
  CHECK(m.is_stop_token(2));
  CHECK(m.is_stop_token(32000));
  CHECK_FALSE(m.is_stop_token(1));
  CHECK_FALSE(StopMatcher().is_stop_token(0));
  CHECK_THROWS_AS(matcher({"a", ""}), m2lm::OptionError);
  CHECK_THROWS_AS(matcher({"\xC3"}), m2lm::OptionError);
  CHECK_THROWS_AS(matcher({"\x80"
                           "a"}),
                  m2lm::OptionError);
}

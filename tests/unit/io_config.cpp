// ConfigValue, JSON lines, JsonWriter, and whole files.
#include <m2lm/io/config.hpp>
#include <m2lm/io/file.hpp>

#include <doctest/doctest.h>

#include <support.hpp>

#include <csignal>
#include <limits>
#include <sys/resource.h>

using m2lm::CheckpointError;
using m2lm::ConfigValue;
using m2lm::InputError;
using m2lm_test::has;
using m2lm_test::message_of;

TEST_CASE("a config gives values of the type asked for") {
  const auto c = ConfigValue::parse_text(
      R"({"hidden_size": 64, "eps": 1e-5, "tied": true, "act": "silu", "window": null, "text_config": {"rope": {"factor": 2}},
          "sizes": [1, 2, 3], "big": 9223372036854775807, "min": -9223372036854775808, "whole": 2.0})", "config.json");
  CHECK(c.get<int>("hidden_size") == 64);
  CHECK(c.get<std::int64_t>("big") == std::numeric_limits<std::int64_t>::max());
  CHECK(c.get<std::int64_t>("min") == std::numeric_limits<std::int64_t>::min());
  CHECK(c.get<double>("eps") == 1e-5);
  CHECK(c.get<float>("hidden_size") == 64.0F);
  CHECK(c.get<bool>("tied"));
  CHECK(c.get<std::string>("act") == "silu");
  CHECK(c.get_or("act", "gelu") == "silu");
  CHECK(c.get_or("window", 7) == 7);
  CHECK(c.get_or("absent", "x") == "x");
  CHECK(c.contains("window"));
  CHECK_FALSE(c.has_value("window"));
  CHECK(c["window"].is_null());
  CHECK(c["text_config"]["rope"].get<double>("factor") == 2.0);
  CHECK(c["text_config"]["rope"]["factor"].path() == "text_config.rope.factor");
  CHECK(c.get_list<std::int64_t>("sizes") == std::vector<std::int64_t>{1, 2, 3});
  CHECK(c["text_config"].keys() == std::vector<std::string>{"rope"});
  CHECK(ConfigValue().is_null());
  CHECK_FALSE(ConfigValue().contains("a"));
}

TEST_CASE("a wrong config names file, key, what was wanted and what was found") {
  const auto c = ConfigValue::parse_text(
      R"({"text_config": {"hidden_size": "64", "layers": 2.5, "heads": 3000000000, "huge": 18446744073709551615, "list": [1, "a"], "o": {}}})",
      "dir/config.json");
  const auto t = c["text_config"];
  const auto message = [](auto&& f) { return message_of<CheckpointError>(f); };
  CHECK(message([&] { (void)t.get<int>("hidden_size"); }) ==
        "dir/config.json: text_config.hidden_size: must be an integer, found string \"64\"");
  CHECK(message([&] { (void)t.get<int>("layers"); }) == "dir/config.json: text_config.layers: must be an integer, found number 2.5");
  CHECK(message([&] { (void)t.get<int>("heads"); }) == "dir/config.json: text_config.heads: the number 3000000000 is out of range here");
  CHECK(has(message([&] { (void)t.get<std::int64_t>("huge"); }), "18446744073709551615 is out of range"));
  CHECK(has(message([&] { (void)t.get<std::uint8_t>("heads"); }), "out of range"));
  CHECK(message([&] { (void)t["absent"]; }) == "dir/config.json: text_config.absent: is missing");
  CHECK(message([&] { (void)t.get_list<int>("list"); }) == "dir/config.json: text_config.list.1: must be an integer, found string \"a\"");
  CHECK(message([&] { (void)t["list"].at(2); }) == "dir/config.json: text_config.list: element 2 is missing; the array has 2");
  CHECK(message([&] { (void)t.get<bool>("layers"); }) == "dir/config.json: text_config.layers: must be true or false, found number 2.5");
  CHECK(has(message([&] { (void)t.get<std::string>("o"); }), "must be a string, found object"));
  CHECK(has(message([&] { (void)t["layers"]["x"]; }), "must be an object with the key \"x\", found number 2.5"));
  CHECK(has(message([&] { (void)t["layers"].keys(); }), "must be an object"));
  CHECK(has(message([&] { (void)t["o"].size(); }), "must be an array"));
  CHECK(message([&] { t["o"].fail("is no good"); }) == "dir/config.json: text_config.o: is no good");
  CHECK(message([] { (void)ConfigValue()["a"]; }) == "(no file): must be an object with the key \"a\", found null");
}

TEST_CASE("JSON that is not JSON") {
  const auto bad = [](std::string_view text) {
    return message_of<CheckpointError>([&] { (void)ConfigValue::parse_text(text, "c.json"); });
  };
  for (const char* text : {"", " ", "{", "[1,", "{\"a\"}", "{\"a\": 1,}", "{\"a\": NaN}", "{\"a\": Infinity}", "nul", "{} x", "\"\xff\"", "1e999", "{'a': 1}"}) {
    CAPTURE(text);
    CHECK(has(bad(text), "c.json: is not valid JSON: "));
  }
  CHECK(has(bad("{\n\"a\": ?}"), "line 2, column"));
  CHECK(bad(std::string(64, '[') + std::string(64, ']')).empty());
  CHECK(has(bad(std::string(65, '[') + std::string(65, ']')), "nested deeper than 64 levels"));
  CHECK(has(bad(std::string(100000, '[')), "nested deeper than 64 levels"));
  CHECK(ConfigValue::parse_text(R"({"a": 1, "a": 2})", "c").get<int>("a") == 2);
  CHECK(has(message_of<CheckpointError>([] { (void)ConfigValue::parse_file("/nowhere/config.json"); }), "/nowhere/config.json: cannot open"));
  CHECK(has(message_of<CheckpointError>([] { (void)ConfigValue::parse_file("/"); }), "is a directory"));
}

TEST_CASE("questions: one JSON value per line") {
  const m2lm_test::TemporaryDirectory dir;
  const auto good = m2lm::parse_json_lines(dir.write("q.jsonl", "{\"question\": \"a\"}\r\n\n  \n{\"question\": \"b\"}"));
  REQUIRE(good.size() == 2);
  CHECK(good[0].get<std::string>("question") == "a");
  CHECK(good[1].get<std::string>("question") == "b");
  CHECK(has(message_of<CheckpointError>([&] { (void)good[1]["image"]; }), "q.jsonl line 4: image: is missing"));
  const std::string path = dir.write("bad.jsonl", "{}\n\n{\"a\":\n");
  CHECK(has(message_of<InputError>([&] { (void)m2lm::parse_json_lines(path); }), "bad.jsonl line 3: is not valid JSON"));
  CHECK(has(message_of<InputError>([&] { (void)m2lm::parse_json_lines(dir / "none"); }), "none: cannot open"));
  CHECK(m2lm::parse_json_lines(dir.write("empty.jsonl", "")).empty());
}

TEST_CASE("JSON that is written reads back") {
  CHECK(m2lm::json_quote("a\"b\\c\n\x01\xc3\xa9") == "\"a\\\"b\\\\c\\n\\u0001\xc3\xa9\"");
  CHECK(m2lm::json_quote("\xff") == "\"\xef\xbf\xbd\"");
  m2lm::JsonWriter w;
  w.begin_object().member("question", "is it \"red\"?").member("tokens", 3).member("time", 0.1).member("ok", true);
  w.key("list").begin_array().value(1).value(2.5).null().begin_object().end_object().end_array();
  w.member("bad", std::numeric_limits<double>::quiet_NaN()).end_object();
  CHECK(w.text() == R"({"question": "is it \"red\"?", "tokens": 3, "time": 0.1, "ok": true, "list": [1, 2.5, null, {}], "bad": null})");
  CHECK(ConfigValue::parse_text(w.text(), "w").get<double>("time") == 0.1);
}

TEST_CASE("files are read whole and written whole") {
  const m2lm_test::TemporaryDirectory dir;
  const std::string path = dir / "file";
  std::string content(100000, 'x');
  content[5] = '\0';
  m2lm::write_file(path, content);
  CHECK(m2lm::read_file(path) == content);
  CHECK(m2lm::file_exists(path));
  CHECK_FALSE(m2lm::file_exists(dir.path()));
  CHECK(m2lm::directory_exists(dir.path()));
  CHECK(m2lm::read_file(path, 100000) == content);
  CHECK(has(message_of<InputError>([&] { (void)m2lm::read_file(path, 99999); }), "longer than the 99999 bytes"));
  CHECK(has(message_of<InputError>([&] { (void)m2lm::read_file("/dev/zero", 1 << 20); }), "longer than"));
  CHECK(has(message_of<InputError>([&] { (void)m2lm::read_file(""); }), "empty file name"));
  CHECK(has(message_of<InputError>([&] { (void)m2lm::read_file(std::string("a\0b", 3)); }), "NUL"));
  CHECK(has(message_of<InputError>([&] { m2lm::write_file(dir / "no/such/file", ""); }), "no/such/file: cannot write the file"));
  CHECK(has(message_of<InputError>([&] { m2lm::write_file(dir.path(), ""); }), "is a directory"));
  CHECK(m2lm::join_path("a", "b") == "a/b");
  CHECK(m2lm::join_path("a/", "b") == "a/b");
  CHECK(m2lm::join_path("", "b") == "b");

  const auto entries = [&] {
    std::size_t n = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(dir.path())) ++n;
    return n;
  };
  {
    m2lm::FileWriter abandoned(path);
    abandoned.write("new");
    CHECK(entries() == 2);
  }
  CHECK(entries() == 1);
  CHECK(m2lm::read_file(path) == content);

  // No space left, by way of the limit on the size of a file.
  struct rlimit before {};
  ::getrlimit(RLIMIT_FSIZE, &before);
  struct rlimit small = before;
  small.rlim_cur = 1000;
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ::setrlimit(RLIMIT_FSIZE, &small);
  const std::string message = message_of<m2lm::CapacityError>([&] { m2lm::write_file(path, content + content); });
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  CHECK(has(message, "file: cannot write the file (1000 bytes were written)"));
  CHECK(entries() == 1);
  CHECK(m2lm::read_file(path) == content);
}

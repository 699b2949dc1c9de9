// Chat templates against the strings the reference implementations make, continuations, and detection.
#include <m2lm/m2lm.hpp>

#include <doctest/doctest.h>
#include <nlohmann/json.hpp>

#include <support/environment.hpp>

#include <fstream>
#include <string>
#include <string_view>
#include <vector>

namespace {

using m2lm::chat_template;
using m2lm::ChatTemplate;
using m2lm::CheckpointFacts;
using m2lm::Message;
using m2lm::Role;

nlohmann::json json_of(const char* path) {
  std::ifstream file(m2lm_test::source_file(path));
  REQUIRE(file.good());
  return nlohmann::json::parse(file);
}

template <class E, class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const E& e) {
    return e.what();
  }
  return "";
}

bool has(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }

std::vector<Message> messages_of(const nlohmann::json& c) {
  std::vector<Message> out;
  if (!c["system"].is_null()) out.push_back({Role::system, c["system"]});
  for (const auto& turn : c["turns"]) {
    out.push_back({Role::user, turn["user"]});
    if (!turn["assistant"].is_null()) out.push_back({Role::assistant, turn["assistant"]});
  }
  return out;
}

std::string_view our_name(std::string_view golden_name) { return golden_name == "llava-hf" ? "user_assistant" : golden_name; }

std::string detect(const CheckpointFacts& facts) { return std::string(m2lm::detect_chat_template(facts).name); }

}  // namespace

TEST_CASE("rendered conversations equal the reference implementations'") {
  const auto golden = json_of("tests/golden/templates.json");
  int cases = 0;
  for (const auto& entry : golden["cases"].items()) {
    const std::string name = entry.key();
    const ChatTemplate& format = chat_template(our_name(name));
    for (const auto& c : entry.value()) {
      std::string expected = c["rendered"];
      CAPTURE(name);
      CAPTURE(expected);
      if (golden["rendered_has_bos"][name].get<bool>()) {
        REQUIRE(expected.starts_with("<s>"));
        CHECK(format.add_bos);  // ours comes from the tokenizer
        expected.erase(0, 3);
      }
      // LLaVA's get_prompt puts the separator behind the user's text too; its training (preprocess_plain) and text models do not.
      if (name == "plain" && expected.ends_with('\n')) expected.pop_back();
      CHECK(m2lm::render(format, messages_of(c)) == expected);
      ++cases;
    }
  }
  CHECK(cases >= 25);
  for (const auto& c : golden["variants"]["llava_llama_2"])
    CHECK(m2lm::render(chat_template("llama-2"), messages_of(c)) == c["rendered"].get<std::string>());
  CHECK(chat_template("vicuna_v1").default_system == golden["default_system"]["vicuna_v1"].get<std::string>());
  for (const auto& [name, stop] : golden["stop_after_answer"].items()) {
    if (name == "plain") continue;  // a base model's text may hold newlines
    const auto stops = chat_template(our_name(name)).stop_strings;
    REQUIRE(stops.size() == 1);
    CHECK(stops[0] == stop.get<std::string>());
  }
}

TEST_CASE("plain is the text itself") {
  const std::vector<Message> caption{{Role::user, "<image>"}, {Role::assistant, "a cat"}};
  CHECK(m2lm::render(chat_template("plain"), caption, false) == "<image>a cat\n");  // LLaVA's projector pretraining
  const std::vector<Message> prompt{{Role::user, " Once upon a time"}};
  CHECK(m2lm::render(chat_template("plain"), prompt) == " Once upon a time");
}

TEST_CASE("without the generation prompt a conversation ends with its last turn") {
  const std::vector<Message> talk{{Role::user, "q"}, {Role::assistant, "a"}};
  const auto whole = [&](const char* name) { return m2lm::render(chat_template(name), talk, false); };
  CHECK(whole("user_assistant") == "USER: q ASSISTANT: a ");
  CHECK(whole("mistral") == "[INST] q [/INST]a</s>");
  CHECK(whole("llama-2") == "[INST] q [/INST] a </s>");
  CHECK(whole("vicuna_v1").ends_with("questions. USER: q ASSISTANT: a</s>"));
}

TEST_CASE("system texts") {
  const auto with = [](const char* name, const char* system) {
    return m2lm::render(chat_template(name), std::vector<Message>{{Role::system, system}, {Role::user, " q "}});
  };
  CHECK(with("vicuna_v1", "S") == "S USER:  q  ASSISTANT:");
  CHECK(with("vicuna_v1", "") == "USER:  q  ASSISTANT:");  // switches the default off
  CHECK(with("llama-2", " S ") == "[INST] <<SYS>>\n S \n<</SYS>>\n\n q [/INST]");
  CHECK(with("llama-2", "") == "[INST] q [/INST]");
  for (const char* name : {"mistral", "plain"}) {
    const std::string e = error_of<m2lm::InputError>([&] { with(name, "S"); });
    CHECK(has(e, "message 0"));
    CHECK(has(e, name));
  }
}

TEST_CASE("a continuation leads to the same text as rendering the whole conversation") {
  for (const ChatTemplate& format : m2lm::chat_templates()) {
    CAPTURE(format.name);
    std::vector<Message> talk{{Role::user, "<image>\nWhat is this?"}};
    std::string text = m2lm::render(format, talk);
    for (const char* question : {"What colour?", "Sure?"}) {
      talk.push_back({Role::assistant, "A cat."});
      talk.push_back({Role::user, question});
      text += std::string(format.answer_prefix) + "A cat." + m2lm::render_continuation(format, question, false);
      CHECK(text == m2lm::render(format, talk));
    }
  }
}

TEST_CASE("a continuation leaves out what the cache holds") {
  const auto next = [](const char* name, bool eos_in_cache) { return m2lm::render_continuation(chat_template(name), "q", eos_in_cache); };
  CHECK(next("vicuna_v1", false) == "</s>USER: q ASSISTANT:");
  CHECK(next("vicuna_v1", true) == "USER: q ASSISTANT:");
  CHECK(next("mistral", false) == "</s>[INST] q [/INST]");
  CHECK(next("mistral", true) == "[INST] q [/INST]");
  CHECK(next("llama-2", false) == " </s><s>[INST] q [/INST]");
  CHECK(next("llama-2", true) == "<s>[INST] q [/INST]");
  CHECK(next("user_assistant", false) == " USER: q ASSISTANT:");
  CHECK(next("user_assistant", true) == " USER: q ASSISTANT:");
  CHECK(next("plain", false) == "\nq");
}

TEST_CASE("placeholders of media come first in a turn") {
  const std::string_view one[] = {"<image>"}, two[] = {"<image>", "<image>"};
  CHECK(m2lm::with_media(chat_template("vicuna_v1"), one, "q") == "<image>\nq");
  CHECK(m2lm::with_media(chat_template("mistral"), two, "q") == "<image>\n<image>\nq");
  CHECK(m2lm::with_media(chat_template("plain"), one, "") == "<image>");
  CHECK(m2lm::with_media(chat_template("llama-2"), {}, "q") == "q");
}

TEST_CASE("conversations out of order are errors that name the message") {
  const ChatTemplate& format = chat_template("mistral");
  const auto fails = [&](std::vector<Message> talk) { return error_of<m2lm::InputError>([&] { m2lm::render(format, talk); }); };
  CHECK(has(fails({}), "no user message"));
  CHECK(has(error_of<m2lm::InputError>([] {
              m2lm::render(chat_template("llama-2"), std::vector<Message>{{Role::system, "S"}});
            }),
            "no user message"));
  CHECK(has(fails({{Role::assistant, "a"}}), "message 0 is of the role assistant"));
  CHECK(has(fails({{Role::user, "q"}, {Role::user, "q"}}), "message 1 is of the role user where the role assistant"));
  CHECK(has(fails({{Role::user, "q"}, {Role::system, "S"}}), "message 1 is of the role system"));
  CHECK(has(fails({{Role::user, "q"}, {Role::assistant, "a"}}), "last message"));
}

TEST_CASE("an unknown name is an error that lists the known ones") {
  const std::string e = error_of<m2lm::OptionError>([] { chat_template("chatml"); });
  CHECK(has(e, "\"chatml\""));
  CHECK(m2lm::chat_templates().size() == 5);
  for (const char* name : {"plain", "vicuna_v1", "user_assistant", "mistral", "llama-2"}) {
    CHECK(has(e, name));
    CHECK(chat_template(name).name == name);
  }
}

TEST_CASE("a checkpoint's own chat template is recognised") {
  const std::string llava = json_of("tests/golden/llava/with_tokenizer/chat_template.json")["chat_template"];
  CHECK(detect({.model_type = "llava", .text_model_type = "llama", .chat_template = llava}) == "user_assistant");
  CHECK(detect({.chat_template = "{{ 'USER: ' + text + ' ASSISTANT:' }}"}) == "user_assistant");
  CHECK(detect({.chat_template = "{{ 'A chat between a curious user and …' }} USER: {{ text }} ASSISTANT:"}) == "vicuna_v1");
  const char* llama_2 = "{{ '<<SYS>>\\n' + system }} {{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}";
  CHECK(detect({.model_type = "llama", .chat_template = llama_2}) == "llama-2");
  CHECK(detect({.model_type = "llava", .text_model_type = "llama", .chat_template = llama_2}) == "llama-2");
  // llava-v1.6-mistral mentions <<SYS>>; its answers are Mistral's.
  CHECK(detect({.model_type = "llava_next", .text_model_type = "mistral", .chat_template = llama_2}) == "mistral");
  CHECK(detect({.model_type = "mistral", .chat_template = "{{ '[INST] ' + content + ' [/INST]' }}"}) == "mistral");
}

TEST_CASE("a chat template that stands for none of the known ones is an error, never a guess") {
  for (const char* jinja :
       {"{{ '<|im_start|>' + role }}", "{{ '<|start_header_id|>' }}", "[SYSTEM_PROMPT]{{ s }}[/SYSTEM_PROMPT][INST]{{ u }}[/INST]"}) {
    const std::string e = error_of<m2lm::OptionError>([&] { detect({.model_type = "llama", .chat_template = jinja}); });
    CHECK(has(e, jinja));
    CHECK(has(e, "--template"));
    CHECK(has(e, "vicuna_v1"));
  }
  const std::string long_one(200, 'x');
  CHECK_FALSE(has(error_of<m2lm::OptionError>([&] { detect({.chat_template = long_one}); }), long_one));
}

TEST_CASE("a checkpoint without a chat template is judged by its kind and name") {
  CHECK(detect({}) == "plain");
  CHECK(detect({.model_type = "llama", .architecture = "LlamaForCausalLM", .name = "stories15M-hf"}) == "plain");
  CHECK(detect({.model_type = "mistral", .name = "mistralai/Mistral-7B-v0.1"}) == "plain");
  CHECK(detect({.model_type = "mistral", .name = "mistralai/Mistral-7B-Instruct-v0.1"}) == "mistral");
  CHECK(detect({.model_type = "llama", .name = "meta-llama/Llama-2-7b-hf"}) == "plain");
  CHECK(detect({.model_type = "llama", .name = "meta-llama/Llama-2-7b-chat-hf"}) == "llama-2");
  CHECK(detect({.model_type = "llama", .name = "lmsys/vicuna-7b-v1.5"}) == "vicuna_v1");
  CHECK(detect({.model_type = "llava", .text_model_type = "llama", .name = "lmsys/vicuna-7b-v1.5"}) == "user_assistant");
  CHECK(detect({.model_type = "llava", .text_model_type = "mistral"}) == "mistral");
  CHECK(detect({.model_type = "llava_llama", .architecture = "LlavaLlamaForCausalLM", .name = "liuhaotian/llava-v1.5-7b"}) == "vicuna_v1");
  CHECK(detect({.architecture = "LlavaLlamaForCausalLM", .name = "liuhaotian/llava-llama-2-13b-chat"}) == "llama-2");
  CHECK(detect({.model_type = "llava_mistral", .architecture = "LlavaMistralForCausalLM"}) == "mistral");
  CHECK(detect({.architecture = "LlavaLlamaForCausalLM", .name = "llava-v1.5-7b-Pretrain"}) == "plain");
}

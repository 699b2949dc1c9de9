// Definitions of models/chat_template.hpp, and the templates and detection rules themselves.
// Floor: models. May include: config, core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/models/chat_template.hpp>

#include <algorithm>
#include <cstddef>

namespace m2lm::inline M2LM_ABI {

namespace detail {

inline constexpr std::string_view eos_literal = "</s>";

/// A model that writes the literal instead of the token has ended its answer too.
inline constexpr std::string_view eos_stop_strings[] = {eos_literal};

inline constexpr ChatTemplate chat_template_table[] = {
    // LLaVA's projector pretraining: "<image>" + caption + "\n". For a text model the prompt itself.
    {.name = "plain", .accepts_system = false, .answer_suffix = "\n"},
    // LLaVA-1.5 and Vicuna 1.1 (llava/conversation.py, conv_vicuna_v1).
    {.name = "vicuna_v1",
     .default_system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
                       "and polite answers to the user's questions.",
     .system_suffix = " ",
     .user_prefix = "USER: ",
     .user_suffix = " ",
     .generation_prompt = "ASSISTANT:",
     .answer_prefix = " ",
     .answer_suffix = "</s>",
     .media_suffix = "\n",
     .stop_strings = eos_stop_strings},
    // The chat template of the llava-hf checkpoints.
    {.name = "user_assistant",
     .system_suffix = " ",
     .user_prefix = "USER: ",
     .user_suffix = " ",
     .generation_prompt = "ASSISTANT:",
     .answer_prefix = " ",
     .answer_suffix = " ",
     .media_suffix = "\n",
     .stop_strings = eos_stop_strings},
    // Mistral-7B-Instruct-v0.1.
    {.name = "mistral",
     .accepts_system = false,
     .user_prefix = "[INST] ",
     .user_suffix = " [/INST]",
     .answer_suffix = "</s>",
     .media_suffix = "\n",
     .stop_strings = eos_stop_strings},
    // Llama-2-chat: every pair of turns is a sequence of its own.
    {.name = "llama-2",
     .system_in_user_turn = true,
     .system_prefix = "<<SYS>>\n",
     .system_suffix = "\n<</SYS>>\n\n",
     .user_prefix = "[INST] ",
     .user_suffix = " [/INST]",
     .next_turn = "<s>",
     .answer_prefix = " ",
     .answer_suffix = " </s>",
     .media_suffix = "\n",
     .strip = true,
     .stop_strings = eos_stop_strings},
};

/// All fields that are not empty must hold. Types are compared whole, the others by a part of them; names without regard to case.
struct ChatTemplateRule {
  std::string_view template_has = {}, template_has_too = {};
  std::string_view model_type = {}, text_model_type = {};
  std::string_view architecture_has = {};
  std::string_view name_has = {}, name_has_too = {};
  std::string_view result = {};
};

/// The first rule that holds decides. For checkpoints with a chat template:
inline constexpr ChatTemplateRule rules_by_template[] = {
    // llava-v1.6-mistral mentions <<SYS>> although Mistral knows no such thing.
    {.template_has = "[INST] ", .text_model_type = "mistral", .result = "mistral"},
    {.template_has = "[INST] ", .template_has_too = "<<SYS>>", .result = "llama-2"},
    {.template_has = "[INST] ", .result = "mistral"},
    {.template_has = "A chat between a curious user", .template_has_too = "ASSISTANT", .result = "vicuna_v1"},
    {.template_has = "USER: ", .template_has_too = "ASSISTANT:", .result = "user_assistant"},
    {.template_has = "upper", .template_has_too = "ASSISTANT:", .result = "user_assistant"},  // role.upper() + ': '
};
/// For checkpoints without one:
inline constexpr ChatTemplateRule rules_by_kind[] = {
    {.architecture_has = "Llava", .name_has = "pretrain", .result = "plain"},
    {.architecture_has = "LlavaMistral", .result = "mistral"},
    {.model_type = "llava_mistral", .result = "mistral"},
    {.model_type = "llava", .text_model_type = "mistral", .result = "mistral"},
    {.architecture_has = "LlavaLlama", .name_has = "llama-2", .result = "llama-2"},
    {.architecture_has = "LlavaLlama", .result = "vicuna_v1"},
    {.model_type = "llava", .result = "user_assistant"},
    {.model_type = "llava_llama", .result = "vicuna_v1"},
    {.name_has = "vicuna", .result = "vicuna_v1"},
    {.name_has = "mistral", .name_has_too = "instruct", .result = "mistral"},
    {.name_has = "llama-2", .name_has_too = "chat", .result = "llama-2"},
    {.result = "plain"},
};

M2LM_IMPL bool contains_ignoring_case(std::string_view text, std::string_view part) {
  const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; };
  return std::search(text.begin(), text.end(), part.begin(), part.end(), [&](char a, char b) { return lower(a) == lower(b); }) != text.end() ||
         part.empty();
}

M2LM_IMPL bool rule_holds(const ChatTemplateRule& rule, const CheckpointFacts& facts) {
  const auto has = [](std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; };
  const auto is = [](std::string_view fact, std::string_view wanted) { return wanted.empty() || fact == wanted; };
  // A text model's own type is its text model type.
  const std::string_view text_type = facts.text_model_type.empty() ? facts.model_type : facts.text_model_type;
  return has(facts.chat_template, rule.template_has) && has(facts.chat_template, rule.template_has_too) && is(facts.model_type, rule.model_type) &&
         is(text_type, rule.text_model_type) && has(facts.architecture, rule.architecture_has) && contains_ignoring_case(facts.name, rule.name_has) &&
         contains_ignoring_case(facts.name, rule.name_has_too);
}

M2LM_IMPL std::string known_chat_templates() {
  std::string names;
  for (const ChatTemplate& known : chat_template_table) names += concat(names.empty() ? "" : ", ", known.name);
  return names;
}

constexpr std::string_view role_name(Role role) { return role == Role::system ? "system" : role == Role::user ? "user" : "assistant"; }

/// As Python's str.strip() for ASCII.
constexpr std::string_view strip_spaces(std::string_view text) {
  constexpr std::string_view spaces = " \t\n\r\v\f";
  const std::size_t begin = text.find_first_not_of(spaces);
  return begin == std::string_view::npos ? std::string_view() : text.substr(begin, text.find_last_not_of(spaces) - begin + 1);
}

M2LM_IMPL void append_turn_text(std::string& out, const ChatTemplate& format, std::string_view text) {
  out += format.strip ? strip_spaces(text) : text;
}

M2LM_IMPL void append_user(std::string& out, const ChatTemplate& format, std::string_view text, bool first) {
  if (!first) out += format.next_turn;
  out += format.user_prefix;
  append_turn_text(out, format, text);
  out += format.user_suffix;
}

}  // namespace detail

M2LM_IMPL std::span<const ChatTemplate> chat_templates() { return detail::chat_template_table; }

M2LM_IMPL const ChatTemplate& chat_template(std::string_view name) {
  for (const ChatTemplate& known : detail::chat_template_table)
    if (known.name == name) return known;
  throw OptionError(concat("m2lm: there is no chat template \"", name, "\": use one of ", detail::known_chat_templates()));
}

M2LM_IMPL std::string with_media(const ChatTemplate& format, std::span<const std::string_view> placeholders, std::string_view text) {
  std::string out;
  for (const std::string_view placeholder : placeholders) {
    out += placeholder;
    out += format.media_suffix;
  }
  out += text;
  return out;
}

M2LM_IMPL std::string render(const ChatTemplate& format, std::span<const Message> messages, bool add_generation_prompt) {
  std::string system(format.default_system);
  std::size_t first = 0;
  if (!messages.empty() && messages[0].role == Role::system) {
    require<InputError>(format.accepts_system, "m2lm: message 0 is a system message, but the chat template ", format.name,
                        " has no system role: put its text into the first user message");
    system = messages[0].text;
    first = 1;
  }
  require<InputError>(first < messages.size(), "m2lm: the conversation has no user message");

  // An empty system text means none at all.
  if (!system.empty()) system = concat(format.system_prefix, system, format.system_suffix);
  std::string out;
  if (!format.system_in_user_turn) out += system;
  for (std::size_t i = first; i < messages.size(); ++i) {
    const Role expected = (i - first) % 2 == 0 ? Role::user : Role::assistant;
    require<InputError>(messages[i].role == expected, "m2lm: message ", i, " is of the role ", detail::role_name(messages[i].role),
                        " where the role ", detail::role_name(expected), " is due: user and assistant take turns, user first");
    if (expected == Role::user) {
      const bool opens = i == first;
      detail::append_user(out, format, opens && format.system_in_user_turn ? system + messages[i].text : messages[i].text, opens);
    } else {
      out += format.generation_prompt;
      out += format.answer_prefix;
      detail::append_turn_text(out, format, messages[i].text);
      out += format.answer_suffix;
    }
  }
  if (add_generation_prompt) {
    require<InputError>(messages.back().role == Role::user, "m2lm: the last message is the assistant's: nothing is left to answer");
    out += format.generation_prompt;
  }
  return out;
}

M2LM_IMPL std::string render_continuation(const ChatTemplate& format, std::string_view user_text, bool eos_in_cache) {
  std::string_view end = format.answer_suffix;
  if (eos_in_cache) {
    const std::size_t eos = end.find(detail::eos_literal);
    if (eos != std::string_view::npos) end.remove_prefix(eos + detail::eos_literal.size());
  }
  if (M2LM_FAULT(15)) end = {};
  std::string out(end);
  detail::append_user(out, format, user_text, false);
  out += format.generation_prompt;
  return out;
}

M2LM_IMPL const ChatTemplate& detect_chat_template(const CheckpointFacts& facts) {
  const std::span<const detail::ChatTemplateRule> rules =
      facts.chat_template.empty() ? std::span<const detail::ChatTemplateRule>(detail::rules_by_kind) : detail::rules_by_template;
  for (const detail::ChatTemplateRule& rule : rules)
    if (detail::rule_holds(rule, facts)) return chat_template(rule.result);
  constexpr std::size_t shown = 80;
  throw OptionError(concat("m2lm: this checkpoint's chat template stands for none that m2lm knows (it begins \"",
                           facts.chat_template.substr(0, shown), facts.chat_template.size() > shown ? "…" : "",
                           "\"): name the one to use, with --template on a command line; known are ", detail::known_chat_templates()));
}

}  // namespace m2lm

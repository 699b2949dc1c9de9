// Chat templates: how a conversation becomes the text that a checkpoint was trained on.
// Floor: models. May include: config, core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/core/error.hpp>

#include <span>
#include <string>
#include <string_view>

namespace m2lm::inline M2LM_ABI {

/// Who says something in a chat.
enum class Role { system, user, assistant };

/// One turn of a chat.
struct Message {
  Role role = Role::user;  ///< who says it
  std::string text;        ///< as typed, without the template's marks
};

/// A template as data. A conversation is
///
///   [system] (user assistant)* user generation_prompt
///
/// where each part is its text between the prefix and suffix below. Between turns BOS and EOS stand in the text as the literals
/// "<s>" and "</s>", which LLaMA's and Mistral's tokenizers know as special tokens; the first BOS does not: the tokenizer adds it
/// once if `add_bos`.
struct ChatTemplate {
  std::string_view name = {};  ///< "vicuna_v1", as programs take it
  bool add_bos = true;         ///< the tokenizer puts BOS before the first turn

  bool accepts_system = true;  ///< false: a system message is refused
  /// The system text goes into the first user turn (llama-2) instead of before it.
  bool system_in_user_turn = false;
  /// Used when the conversation has no system message; an empty one switches it off.
  std::string_view default_system = {};
  std::string_view system_prefix = {};  ///< before the system text
  std::string_view system_suffix = {};  ///< behind the system text

  std::string_view user_prefix = {};  ///< before what the user says
  std::string_view user_suffix = {};  ///< behind what the user says
  /// Before the second and every later user turn.
  std::string_view next_turn = {};

  /// Ends a prompt whose answer is to be generated.
  std::string_view generation_prompt = {};
  std::string_view answer_prefix = {};  ///< between generation_prompt and an answer, when the conversation goes on
  std::string_view answer_suffix = {};  ///< behind that answer

  /// Behind a picture's placeholder that stands before the text of a turn.
  std::string_view media_suffix = {};
  /// White space around the texts of turns is cut.
  bool strip = false;
  /// Texts that end an answer besides the checkpoint's EOS token.
  std::span<const std::string_view> stop_strings = {};
};

/// The known templates: plain, vicuna_v1, user_assistant, mistral, llama-2.
std::span<const ChatTemplate> chat_templates();

/// throws OptionError that lists the known names.
const ChatTemplate& chat_template(std::string_view name);

/// The text of a user turn with one placeholder ("<image>") for each medium before it, as the checkpoint saw it in training.
std::string with_media(const ChatTemplate& format, std::span<const std::string_view> placeholders, std::string_view text);

/// The whole conversation. requires a system message, if any, first; then user and assistant in turns, user first; the last is a user's
/// if `add_generation_prompt`. Literals such as "</s>" inside the messages are not escaped.
/// throws InputError that names the message.
std::string render(const ChatTemplate& format, std::span<const Message> messages, bool add_generation_prompt = true);

/// What to append when a session that has `render(…)` and the generated answer in its cache gets the next user text; ends with the
/// generation prompt. `eos_in_cache`: the answer ended with EOS and that token has been fed to the decoder (the last token chosen
/// usually has not). ensures for an answer without EOS: render of the longer conversation = render of the shorter + answer_prefix +
/// answer + this.
std::string render_continuation(const ChatTemplate& format, std::string_view user_text, bool eos_in_cache);

/// What a checkpoint says about itself; empty where it says nothing.
struct CheckpointFacts {
  std::string_view model_type = {};       ///< config.json: model_type
  std::string_view text_model_type = {};  ///< config.json: text_config.model_type
  std::string_view architecture = {};     ///< config.json: architectures[0]
  /// `_name_or_path`, or the directory's name.
  std::string_view name = {};
  /// The Jinja text in chat_template.jinja, chat_template.json or tokenizer_config.json.
  std::string_view chat_template = {};
};

/// The template of a checkpoint. One with no chat template of its own is judged by its type and name; a base model gets `plain`. The
/// Jinja text is recognised by signatures, not run.
/// throws OptionError if the checkpoint has a chat template that none of the known ones stands for.
const ChatTemplate& detect_chat_template(const CheckpointFacts& facts);

}  // namespace m2lm

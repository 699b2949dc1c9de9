// Chat templates: detection from what a checkpoint says, and rendering of any conversation.
#include "fuzz.hpp"

#include <m2lm/models/chat_template.hpp>

#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  m2lm_fuzz::Parts parts(data, size);
  const bool add_prompt = (parts.byte() & 1) != 0;
  m2lm::CheckpointFacts facts;
  for (std::string_view* fact : {&facts.model_type, &facts.text_model_type, &facts.architecture, &facts.name, &facts.chat_template})
    *fact = parts.string();
  m2lm_fuzz::accepted([&] { (void)m2lm::detect_chat_template(facts); });
  m2lm_fuzz::accepted([&] { (void)m2lm::chat_template(facts.name); });

  std::vector<m2lm::Message> messages;
  while (!parts.empty()) {
    const auto role = static_cast<m2lm::Role>(parts.byte() % 3);
    messages.push_back({role, std::string(parts.string())});
  }
  for (const m2lm::ChatTemplate& format : m2lm::chat_templates()) {
    std::string text;
    if (!m2lm_fuzz::accepted([&] { text = m2lm::render(format, messages, add_prompt); })) continue;
    std::size_t least = 0;
    if (!format.strip)
      for (const m2lm::Message& message : messages) least += message.text.size();
    m2lm_fuzz::check(text.size() >= least, "a rendered conversation holds all its messages");
    if (!add_prompt || messages.empty()) continue;
    // The promise of render_continuation.
    constexpr std::string_view answer = "yes", next = "and then?";
    std::vector<m2lm::Message> longer = messages;
    longer.push_back({m2lm::Role::assistant, std::string(answer)});
    longer.push_back({m2lm::Role::user, std::string(next)});
    const std::string whole = m2lm::render(format, longer);
    const std::string pieces = text + std::string(format.answer_prefix) + std::string(answer) + m2lm::render_continuation(format, next, false);
    m2lm_fuzz::check(whole == pieces, "a continuation equals the longer conversation");
  }
  const std::string_view media[] = {facts.name, facts.model_type};
  for (const m2lm::ChatTemplate& format : m2lm::chat_templates()) (void)m2lm::with_media(format, media, facts.chat_template);
  return 0;
}

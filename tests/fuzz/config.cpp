// config.json: any bytes are read or refused, and so are the configurations in them.
#include "fuzz.hpp"

#include <m2lm/m2lm.hpp>

namespace {

/// Asks every value for everything; `levels` is what the reader allows at most.
void walk(const m2lm::ConfigValue& value, int levels) {
  m2lm_fuzz::check(levels >= 0, "nesting is limited");
  m2lm_fuzz::accepted([&] { (void)value.as<bool>(); });
  m2lm_fuzz::accepted([&] { (void)value.as<std::int32_t>(); });
  m2lm_fuzz::accepted([&] { (void)value.as<std::uint64_t>(); });
  m2lm_fuzz::accepted([&] { (void)value.as<double>(); });
  m2lm_fuzz::accepted([&] { (void)m2lm::json_quote(value.as<std::string>()); });
  if (value.is_array())
    for (std::size_t i = 0; i < value.size(); ++i) walk(value.at(i), levels - 1);
  if (value.is_object())
    for (const std::string& key : value.keys()) walk(value[key], levels - 1);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  m2lm::ConfigValue root;
  if (!m2lm_fuzz::accepted([&] { root = m2lm::ConfigValue::parse_text(m2lm_fuzz::text(data, size), "config.json"); })) return 0;
  walk(root, 64);
  m2lm_fuzz::accepted([&] {
    m2lm::LlamaConfig config;
    read_config(root, config);
    m2lm_fuzz::check(config.hidden_size > 0 && config.num_heads % config.num_kv_heads == 0 && config.head_dim % 2 == 0,
                     "an accepted LlamaConfig is consistent");
  });
  m2lm_fuzz::accepted([&] {
    m2lm::ClipVisionConfig config;
    read_config(root, config);
    m2lm_fuzz::check(config.hidden_size % config.num_heads == 0, "an accepted ClipVisionConfig is consistent");
  });
  m2lm_fuzz::accepted([&] {
    m2lm::ProjectorConfig config;
    read_config(root, config);
  });
  m2lm_fuzz::accepted([&] { (void)m2lm::read_stop_tokens("/nonexistent", root); });
  return 0;
}

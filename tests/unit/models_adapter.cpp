// PEFT adapters: merged or beside the weights, the logits are PEFT's; what does not fit is named.
#include "models_support.hpp"

#include <cstdio>

using namespace m2lm_test;  // NOLINT: a test
using m2lm::AdapterMode;
using m2lm::CheckpointError;
using m2lm::LoadOptions;

namespace {

struct Case {
  const char* adapter;
  const char* base;
};
constexpr Case text_cases[] = {{"attention", "llama/mha_plain"}, {"all_rslora", "llama/mqa_llama3_hd10"}};
constexpr AdapterMode modes[] = {AdapterMode::merge, AdapterMode::beside};

std::string adapter(const char* name) { return golden(std::string("adapters/") + name); }

template <class M>
double tolerance_of(const M& model) {
  const auto& c = model.decoder_config();
  // An adapter of this size adds one more rounding per product.
  return 2 * m2lm::testing::network_tolerance(m2lm::testing::epsilon_f32, m2lm::testing::epsilon_f32, std::max(c.hidden_size, c.intermediate_size),
                                              c.num_layers);
}

template <class B>
void check_text(const Case& c, AdapterMode mode, B backend) {
  const std::string directory = adapter(c.adapter);
  const auto model = TextModel<B>::from_pretrained(golden(c.base), backend, {.adapter = directory, .adapter_mode = mode});
  const auto ids = ids_of(Safetensors::open(golden(c.base) + "/golden.safetensors").tensor("input_ids"));
  M2LM_CHECK_CLOSE(model.logits(model.prompt(ids)), Safetensors::open(directory + "/golden.safetensors").tensor("logits"), tolerance_of(model),
                   std::string(c.adapter) + (mode == AdapterMode::merge ? " merged" : " beside"));
}

std::string message(const std::string& directory, const char* base = "llama/mha_plain", AdapterMode mode = AdapterMode::merge) {
  return message_of<CheckpointError>([&] { (void)Lm::from_pretrained(golden(base), Cpu(), {.adapter = directory, .adapter_mode = mode}); });
}

}  // namespace

TEST_CASE("decoders with an adapter: PEFT's logits, merged and beside, at every level and on the reference backends") {
  for (const Case& c : text_cases)
    for (const AdapterMode mode : modes) {
      for (const IsaLevel level : isa_levels()) check_text(c, mode, cpu_at(level));
      check_text(c, mode, m2lm::Reference<double>{});
      check_text(c, mode, m2lm::Reference<float>{});
    }
}

TEST_CASE("an adapter over the whole of LLaVA: tower, projector and decoder, named in another dialect than the base") {
  const std::string directory = adapter("llava"), base = golden("llava/old_keys_m2_default");
  const Safetensors record = Safetensors::open(directory + "/golden.safetensors"), inputs = Safetensors::open(base + "/golden_2img.safetensors");
  for (const AdapterMode mode : modes)
    for (const IsaLevel level : isa_levels()) {
      const auto model = Vlm::from_pretrained(base, cpu_at(level), {.adapter = directory, .adapter_mode = mode});
      const double tolerance = tolerance_of(model);
      const AnyTensor features = record.tensor("features"), pixels = inputs.tensor("pixel_values");
      auto prompt = model.prompt(ids_of(inputs.tensor("input_ids")));
      for (std::int64_t i = 0; i < 2; ++i) {
        // The golden's pixels are numbers that no picture has: through the parts, as the model would.
        prompt.attach_embeddings<"image">(AnyTensor(slice<float>(features, i)));
      }
      M2LM_CHECK_CLOSE(model.logits(prompt), record.tensor("logits"), tolerance, "llava");
    }
}

TEST_CASE("a tower and a projector with updates beside them compute what merged ones do") {
  const std::string directory = adapter("llava"), base = golden("llava/old_keys_m2_default");
  const m2lm::Image picture = m2lm::load_image(golden("llava/with_tokenizer/picture.png"));
  const auto with = [&](AdapterMode mode) { return Vlm::from_pretrained(base, Cpu(), {.adapter = directory, .adapter_mode = mode}); };
  const Tensor<float> merged = with(AdapterMode::merge).encode<"image">(picture), beside = with(AdapterMode::beside).encode<"image">(picture);
  const Tensor<float> without = Vlm::from_pretrained(base).encode<"image">(picture);
  CHECK(m2lm::testing::relative_error(beside, AnyTensor(merged.clone())) < 1e-5);
  CHECK(m2lm::testing::relative_error(without, AnyTensor(merged.clone())) > 1e-2);
}

TEST_CASE("beside bf16 weights the update itself stays exact; merged it is rounded with them") {
  const Case& c = text_cases[0];
  const auto ids = ids_of(Safetensors::open(golden(c.base) + "/golden.safetensors").tensor("input_ids"));
  const AnyTensor exact = Safetensors::open(adapter(c.adapter) + "/golden.safetensors").tensor("logits");
  const auto error = [&](AdapterMode mode) {
    const Lm model = Lm::from_pretrained(golden(c.base), Cpu(),
                                         {.precision = Precision{.weights = DType::bf16}, .adapter = adapter(c.adapter), .adapter_mode = mode});
    return m2lm::testing::relative_error(model.logits(model.prompt(ids)), exact);
  };
  const double merged = error(AdapterMode::merge), beside = error(AdapterMode::beside);
  std::printf("bf16 weights with an adapter: merged %.2g, beside %.2g\n", merged, beside);
  CHECK(merged < 0.1);
  CHECK(beside < 0.1);
}

TEST_CASE("generation with an adapter beside the weights is that of the merged model, alone and in pieces") {
  const Case& c = text_cases[1];
  const auto ids = ids_of(Safetensors::open(golden(c.base) + "/golden.safetensors").tensor("input_ids"));
  std::vector<std::int32_t> answers[2];
  for (const AdapterMode mode : modes) {
    const Lm model = Lm::from_pretrained(golden(c.base), Cpu(), {.adapter = adapter(c.adapter), .adapter_mode = mode});
    answers[static_cast<int>(mode)] = model.generate(model.prompt(ids), {.max_new_tokens = 8, .ignore_eos = true}).tokens;
  }
  CHECK(answers[0] == answers[1]);
}

TEST_CASE("a merged model is saved as one; an update beside the weights is not lost in silence") {
  const TemporaryDirectory dir;
  const Lm merged = Lm::from_pretrained(golden("llama/mha_plain"), Cpu(), {.adapter = adapter("attention")});
  merged.save_pretrained(dir / "merged");
  const auto ids = some_ids(9, 96);
  CHECK(same_bits(Lm::from_pretrained(dir / "merged").logits(merged.prompt(ids)), merged.logits(merged.prompt(ids))));
  const Lm beside = Lm::from_pretrained(golden("llama/mha_plain"), Cpu(), {.adapter = adapter("attention"), .adapter_mode = AdapterMode::beside});
  CHECK(has(message_of<m2lm::OptionError>([&] { beside.save_pretrained(dir / "beside"); }),
            "has an adapter beside it, which is not saved; load the adapter merged"));
}

TEST_CASE("an adapter of another base, another rank, unknown targets and other kinds") {
  CHECK(has(message(golden("adapters/none")), "there is no adapter directory"));
  CHECK(has(message(golden("adapters")), "adapter_config.json"));
  // Of a wider base: every module is named, with both shapes.
  const std::string wrong = message(adapter("all_rslora"));
  CHECK(has(wrong, "adapter_model.safetensors: the adapter does not fit this model (it was made for \"llama/mqa_llama3_hd10\"):"));
  CHECK(has(wrong, "model.layers.0.mlp.down_proj: A [3, 56] and B [40, 3] do not fit the base's weight [32, 56]"));
  CHECK(has(wrong, "lm_head.weight is [96, 40] in f32, the base has [96, 32]"));
  CHECK(has(message(adapter("llava")), "the model has no such module"));

  const auto changed = [](const char* old_text, const char* new_text) {
    const TemporaryDirectory copy;
    copy_directory(adapter("attention"), copy);
    change_text(copy, "adapter_config.json", old_text, new_text);
    return message(copy.path());
  };
  CHECK(has(changed("\"r\": 4", "\"r\": 5"), "A [4, 32] and B [32, 4] are not of the rank 5 that adapter_config.json says"));
  CHECK(has(changed("\"r\": 4", "\"r\": 0"), "r = 0 is outside 1 to 65536"));
  CHECK(has(changed("\"v_proj\"", "\"v_proj\", \"x_proj\""), "target_modules names \"x_proj\", of which the file has no tensors"));
  CHECK(has(changed("\"modules_to_save\": null", "\"modules_to_save\": [\"lm_head\"]"),
            "modules_to_save names \"lm_head\", of which the file has no tensors"));
  CHECK(has(changed("\"LORA\"", "\"IA3\""), "adapters of the type IA3 are not supported; LORA is"));
  CHECK(has(changed("\"use_dora\": false", "\"use_dora\": true"), "use_dora: true is not supported"));
  CHECK(has(changed("\"rank_pattern\": {}", "\"rank_pattern\": {\".*q_proj\": 8}"), "is a regular expression; only names of modules are supported"));
  CHECK(has(changed("\"rank_pattern\": {}", "\"rank_pattern\": {\"q_proj\": 8}"), "q_proj: A [4, 32] and B [32, 4] are not of the rank 8"));

  const auto with_tensors = [](auto&& change) {
    const TemporaryDirectory copy;
    copy_directory(adapter("attention"), copy);
    std::filesystem::rename(copy / "adapter_model.safetensors", copy / "model.safetensors");
    change_tensors(copy, change);
    std::filesystem::rename(copy / "model.safetensors", copy / "adapter_model.safetensors");
    return message(copy.path());
  };
  CHECK(has(with_tensors([](auto& t) { t.erase(t.begin()); }), "lora_A.weight is missing"));
  CHECK(has(with_tensors([](auto& t) { t[0].name = "base_model.model.model.layers.0.self_attn.z_proj.lora_A.weight"; }),
            "model.layers.0.self_attn.z_proj: lora_B.weight is missing"));
  CHECK(has(with_tensors([](auto& t) {
              for (auto& x : t)
                if (const auto at = x.name.find("layers.2"); at != std::string::npos) x.name.replace(at, 8, "layers.9");
            }),
            "model.layers.9.self_attn.q_proj: the model has no such module; the nearest is model.layers.0.self_attn.q_proj.weight"));
  CHECK(has(with_tensors([](auto& t) { t[0].name = "model.layers.0"; }), "model.layers.0 does not begin with base_model.model."));
  CHECK(has(with_tensors([](auto& t) { t[0].name = "base_model.model.model.embed_tokens.lora_embedding_A"; }),
            "an update of this kind is not supported"));
  const TemporaryDirectory linked;
  std::filesystem::copy_file(adapter("attention") + "/adapter_config.json", linked / "adapter_config.json");
  std::filesystem::create_symlink(std::filesystem::absolute(adapter("attention") + "/adapter_model.safetensors"),
                                  linked / "adapter_model.safetensors");
  CHECK(has(message(linked.path()), "holds what is not its own: adapter_model.safetensors"));
  CHECK(has(with_tensors([](auto& t) { t.clear(); }), "of which the file has no tensors"));
}

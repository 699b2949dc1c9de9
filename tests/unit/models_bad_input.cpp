// Checkpoints that are damaged, contradictory or unknown: errors that name file, tensor or key, and both sides.
#include "models_support.hpp"

#include <limits>

namespace {

using namespace m2lm_test;
using m2lm::CheckpointError;
using m2lm::LoadOptions;
using m2lm::NamedTensor;

namespace t = m2lm::testing;

/// A synthetic checkpoint that a test may damage.
struct Damaged : TemporaryDirectory {
  Damaged() { t::write_synthetic_llama(path()); }
  template <class F>
  explicit Damaged(F&& damage) : Damaged() {
    damage(*this);
  }
};
struct DamagedLlava : TemporaryDirectory {
  DamagedLlava() { t::write_synthetic_llava(path()); }
};

template <class E = CheckpointError, class M = Lm>
std::string said(const TemporaryDirectory& directory, const LoadOptions& options = {}) {
  const std::string message = message_of<E>([&] { M::from_pretrained(directory.path(), Cpu({.threads = 1}), options); });
  CHECK_MESSAGE(!message.empty(), "no error");
  return message;
}

#define CHECK_SAYS(text, ...)                                                                       \
  do {                                                                                              \
    const std::string m2lm_message = (text);                                                        \
    for (const char* m2lm_part : {__VA_ARGS__}) CHECK_MESSAGE(has(m2lm_message, m2lm_part), std::string(m2lm_part), " is not in: ", m2lm_message); \
  } while (false)

NamedTensor& named(std::vector<NamedTensor>& tensors, std::string_view name) {
  for (NamedTensor& x : tensors)
    if (x.name == name) return x;
  FAIL("no tensor " << std::string(name));
  return tensors.front();
}

}  // namespace

// ---- tensors ---------------------------------------------------------------------------------------------------------------------

TEST_CASE("one report lists missing, mis-shaped and unexpected tensors, with the nearest names") {
  const Damaged directory;
  change_tensors(directory, [](std::vector<NamedTensor>& tensors) {
    named(tensors, "model.layers.0.self_attn.q_proj.weight").name = "model.layers.0.self_attn.q_porj.weight";
    std::erase_if(tensors, [](const NamedTensor& x) { return x.name == "model.norm.weight"; });
    named(tensors, "model.layers.1.mlp.up_proj.weight").tensor = AnyTensor(Tensor<float>(Shape{32, 48}));
    named(tensors, "model.layers.1.input_layernorm.weight").tensor = AnyTensor(Tensor<std::int32_t>(Shape{32}));
    tensors.push_back({"something.else", AnyTensor(Tensor<float>(Shape{2}))});
  });
  const std::string message = said(directory);
  CHECK_SAYS(message, directory.path().c_str(), "2 tensors missing, 2 of another shape, 2 unexpected");
  CHECK_SAYS(message, "model.layers.0.self_attn.q_proj.weight is missing; the nearest name is model.layers.0.self_attn.q_porj.weight", "model.norm.weight is missing");
  CHECK_SAYS(message, "model.layers.1.mlp.up_proj.weight is [32, 48] in f32", "expected [48, 32] in a floating dtype", "model.safetensors");
  CHECK_SAYS(message, "model.layers.1.input_layernorm.weight is [32] in i32", "something.else is unexpected");
  CHECK(std::count(message.begin(), message.end(), '\n') == 6);
}

TEST_CASE("tensors that the model does not know are reported, or refused on demand") {
  const Damaged directory;
  change_tensors(directory, [](std::vector<NamedTensor>& tensors) {
    tensors.push_back({"model.layers.0.self_attn.rotary_emb.inv_freq", AnyTensor(Tensor<float>(Shape{4}))});  // old files have it
    tensors.push_back({"model.layers.0.adapter.weight", AnyTensor(Tensor<float>(Shape{4}))});
  });
  const Lm model = Lm::from_pretrained(directory.path());
  REQUIRE(model.load_report().unexpected.size() == 1);
  CHECK_SAYS(model.load_report().string(), "model.layers.0.adapter.weight is unexpected", "model.safetensors");
  CHECK_SAYS(said(directory, {.allow_unexpected = false}), "does not know", "model.layers.0.adapter.weight", directory.path().c_str());
  change_tensors(directory, [](std::vector<NamedTensor>& tensors) { std::erase_if(tensors, [](const NamedTensor& x) { return has(x.name, "adapter"); }); });
  CHECK_NOTHROW(Lm::from_pretrained(directory.path(), Cpu(), {.allow_unexpected = false}));
}

TEST_CASE("a model with pictures says which of its parts a text checkpoint lacks") {
  const Damaged directory;
  CHECK_SAYS((said<CheckpointError, Vlm>(directory)), "config.json", "\"llama\" is not supported by ClipVit");
  const DamagedLlava llava, half;
  change_tensors(half, [](std::vector<NamedTensor>& tensors) { std::erase_if(tensors, [](const NamedTensor& x) { return !has(x.name, "language_model"); }); });
  CHECK_SAYS((said<CheckpointError, Vlm>(half)), "multi_modal_projector.linear_1.weight is missing", "patch_embedding.weight is missing");
  CHECK_NOTHROW(Vlm::from_pretrained(llava.path()));
  // A text model leaves the vision part alone, but says that it is there.
  const Lm text = Lm::from_pretrained(llava.path());
  CHECK(has(text.load_report().string(), "multi_modal_projector.linear_1.weight is unexpected"));
}

TEST_CASE("a projector or vision tower of another width") {
  const DamagedLlava directory;
  change_tensors(directory, [](std::vector<NamedTensor>& tensors) {
    named(tensors, "multi_modal_projector.linear_2.weight").tensor = AnyTensor(Tensor<float>(Shape{30, 32}));
    named(tensors, "vision_tower.vision_model.embeddings.position_embedding.weight").tensor = AnyTensor(Tensor<float>(Shape{10, 24}));
  });
  CHECK_SAYS((said<CheckpointError, Vlm>(directory)), "multi_modal_projector.linear_2.weight is [30, 32]", "expected [32, 32]", "position_embedding.weight is [10, 24]",
             "expected [5, 24]");
}

TEST_CASE("weights that are NaN, or overflow: an error when a token is chosen, and when they are checked, with tensor, file and index") {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
    const Damaged directory;
    change_tensors(directory, [&](std::vector<NamedTensor>& tensors) {
      Tensor<float> values = named(tensors, "model.norm.weight").tensor.to<float>();
      values.data()[7] = values.data()[9] = bad;
      named(tensors, "model.norm.weight").tensor = AnyTensor(std::move(values));
    });
    const char* value = bad != bad ? "is NaN" : bad > 0 ? "is inf" : "is -inf";
    const std::string where = "tensor \"model.norm.weight\" (" + (directory / "model.safetensors") + "): element [7] of [32]";
    const Lm model = Lm::from_pretrained(directory.path());
    auto session = model.session();
    for (const double temperature : {0.0, 1.0})
      CHECK_SAYS(message_of<m2lm::NumericError>([&] { session.generate(model.prompt(some_ids(3, 96)), {.temperature = temperature}); }), "the logit of token", "weights are damaged",
                 where.c_str(), value);
    CHECK(session.length() == 0);
    CHECK_SAYS(said(directory, {.check = true}), directory.path().c_str(), "not finite", where.c_str(), value, "2 such elements");
  }
  CHECK_NOTHROW(Lm::from_pretrained(Damaged().path(), Cpu(), {.check = true}));
}

TEST_CASE("the check of weights finds the first NaN of any floating dtype, and lists every tensor that has one") {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
    CAPTURE(std::string(m2lm::dtype_name(dtype)));
    const Damaged directory;
    change_tensors(directory, [&](std::vector<NamedTensor>& tensors) {
      const auto put = [&]<class T>(const char* name, std::int64_t index, T nan) {
        AnyTensor& tensor = named(tensors, name).tensor;
        Tensor<T> values(tensor.shape());
        values.data()[index] = nan;
        tensor = AnyTensor(std::move(values));
      };
      for (const auto& [name, index] : {std::pair("model.layers.1.mlp.up_proj.weight", std::int64_t{32 * 5 + 6}), std::pair("model.embed_tokens.weight", std::int64_t{0})}) {
        if (dtype == DType::f32) put(name, index, std::numeric_limits<float>::quiet_NaN());
        if (dtype == DType::f64) put(name, index, std::numeric_limits<double>::quiet_NaN());
        if (dtype == DType::bf16) put(name, index, m2lm::Bf16{0x7fc0});
        if (dtype == DType::f16) put(name, index, m2lm::Half{0xfe00});
      }
    });
    CHECK_SAYS(said(directory, {.check = true}), "\"model.layers.1.mlp.up_proj.weight\"", "element [5, 6] of [48, 32] is NaN; 1 such", "\"model.embed_tokens.weight\"", "element [0, 0]");
  }
}

// ---- files -------------------------------------------------------------------------------------------------------------------------

TEST_CASE("files that are missing or damaged name themselves") {
  CHECK_SAYS(message_of<CheckpointError>([] { Lm::from_pretrained("/no/such/directory"); }), "/no/such/directory");
  CHECK_SAYS(said(Damaged([](auto& d) { std::filesystem::remove(d / "config.json"); })), "config.json");
  CHECK_SAYS(said(Damaged([](auto& d) { d.write("config.json", "{\"vocab_size\": 96,"); })), "config.json", "line 1");
  CHECK_SAYS(said(Damaged([](auto& d) { d.write("config.json", "[]"); })), "config.json");
  CHECK_SAYS(said(Damaged([](auto& d) { std::filesystem::remove(d / "model.safetensors"); })), "safetensors");
  CHECK_SAYS(said(Damaged([](auto& d) { std::filesystem::resize_file(d / "model.safetensors", 5000); })), "model.safetensors");
  CHECK_SAYS(said(Damaged([](auto& d) { d.write("model.safetensors", ""); })), "model.safetensors");
  CHECK_SAYS(said(Damaged([](auto& d) { d.write("generation_config.json", "{"); })), "generation_config.json");

  const TemporaryDirectory shards;
  copy_directory(golden("llama/gqa_linear_tied_sharded"), shards);
  CHECK_NOTHROW(Lm::from_pretrained(shards.path()));
  std::filesystem::remove(shards / "model-00002-of-00003.safetensors");
  CHECK_SAYS(said(shards), "model-00002-of-00003.safetensors");
}

TEST_CASE("a cut of every length is an error, not a crash") {
  const Damaged directory;
  const std::string whole = m2lm::read_file(directory / "model.safetensors");
  for (std::size_t length = 0; length < whole.size(); length += 1 + whole.size() / 97) {
    directory.write("model.safetensors", whole.substr(0, length));
    CHECK_THROWS_AS(Lm::from_pretrained(directory.path()), CheckpointError);
  }
}

TEST_CASE("without a tokenizer ids work, and text says what is missing") {
  const Damaged directory;
  const Lm model = Lm::from_pretrained(directory.path());
  CHECK(model.generate(model.prompt(some_ids(3, 96)), {.max_new_tokens = 2, .ignore_eos = true}).tokens.size() == 2);
  for (const std::string& message : {message_of<m2lm::InputError>([&] { model.generate(model.prompt("Hello")); }), message_of<m2lm::InputError>([&] { model.logits(model.raw_prompt("Hello")); }),
                                     message_of<m2lm::InputError>([&] { model.tokenizer(); })})
    CHECK_SAYS(message, "tokenizer.model", directory.path().c_str());

  // A byte-level BPE tokenizer without tokens for all bytes is none that is known.
  directory.write("tokenizer.json", R"({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}})");
  const Lm other = Lm::from_pretrained(directory.path());
  CHECK_SAYS(message_of<m2lm::InputError>([&] { other.generate(other.prompt("Hello")); }), "tokenizer.json", "not supported");
}

TEST_CASE("an id that the vocabulary leaves out has no text, and ends nothing") {
  const TemporaryDirectory directory;
  copy_directory(golden("llava/with_tokenizer"), directory);
  directory.write("added_tokens.json", R"({"<image>": 340, "<pad>": 341, "<behind the hole>": 345})");
  change_tensors(directory, [](std::vector<NamedTensor>& tensors) {
    const auto head = std::find_if(tensors.begin(), tensors.end(), [](const NamedTensor& x) { return x.name.ends_with("lm_head.weight"); });
    REQUIRE(head != tensors.end());
    Tensor<float> rows(head->tensor.shape());  // of two opposite rows one has the largest logit, whatever the hidden state
    for (std::int64_t i = 0; i < rows.shape()[1]; ++i) {
      rows.data()[343 * rows.shape()[1] + i] = 1;
      rows.data()[344 * rows.shape()[1] + i] = -1;
    }
    head->tensor = AnyTensor(std::move(rows));
  });
  const Vlm model = Vlm::from_pretrained(directory.path());
  CHECK_FALSE(model.tokenizer().contains(343));
  CHECK(model.tokenizer().contains(345));
  CHECK_FALSE(model.tokenizer().contains(346));
  CHECK_FALSE(model.tokenizer().contains(-1));
  const m2lm::Generation answer = model.generate(model.prompt("Hello"), {.max_new_tokens = 4, .ignore_eos = true});
  REQUIRE(answer.tokens.size() == 4);
  for (const std::int32_t id : answer.tokens) CHECK((id == 343 || id == 344));
  CHECK(answer.text.empty());
}

// ---- config.json ---------------------------------------------------------------------------------------------------------------------

TEST_CASE("contradictions and unknown words of config.json") {
  const auto with = [](const char* old_text, const char* new_text) {
    const Damaged directory;
    change_text(directory, "config.json", old_text, new_text);
    return said(directory);
  };
  CHECK_SAYS(with("\"num_attention_heads\": 4", "\"num_attention_heads\": 5"), "config.json", "5 attention heads", "2 key-value heads");
  CHECK_SAYS(with("\"head_dim\": 8", "\"head_dim\": 7"), "config.json", "head_dim = 7 is odd");
  CHECK_SAYS(with("\"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"head_dim\": 8", "\"num_attention_heads\": 6, \"num_key_value_heads\": 2"), "hidden_size 32",
             "6 attention heads");
  CHECK_SAYS(with("\"hidden_act\": \"silu\"", "\"hidden_act\": \"mish\""), "config.json", "\"mish\" is not supported", "silu", "quick_gelu");
  CHECK_SAYS(with("\"model_type\": \"llama\"", "\"model_type\": \"gpt2\""), "config.json", "\"gpt2\" is not supported", "llama and mistral");
  CHECK_SAYS(with("\"rope_type\": \"default\"", "\"rope_type\": \"yarn\", \"factor\": 2"), "rope_parameters", "\"yarn\" is not supported", "llama3");
  CHECK_SAYS(with("\"rope_type\": \"default\"", "\"rope_type\": \"linear\", \"factor\": -2"), "factor", "not above 0");
  CHECK_SAYS(with("\"rope_type\": \"default\"", "\"rope_type\": \"llama3\", \"factor\": 2, \"low_freq_factor\": 4, \"high_freq_factor\": 4"), "low_freq_factor",
             "high_freq_factor");
  CHECK_SAYS(with("\"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"head_dim\": 8", "\"num_attention_heads\": 64, \"num_key_value_heads\": 64"), "hidden_size 32",
             "64 attention heads");
  CHECK_SAYS(with("\"rms_norm_eps\"", "\"text_config\": [\"x\"], \"rms_norm_eps\""), "text_config", "object");
  CHECK_SAYS(with("\"rope_parameters\": {", "\"rope_parameters\": \"linear\", \"unused\": {"), "rope_parameters", "object");
  CHECK_SAYS(with("\"hidden_size\": 32", "\"hidden_size\": -32"), "config.json", "hidden_size = -32");
  CHECK_SAYS(with("\"hidden_size\": 32", "\"hidden_size\": \"32\""), "config.json", "hidden_size");
  CHECK_SAYS(with("\"hidden_size\": 32", "\"hidden_size\": 32.5"), "config.json", "hidden_size");
  CHECK_SAYS(with("\"hidden_size\": 32", "\"hidden_size\": 64"), "does not fit the model", "expected [96, 64]");
  CHECK_SAYS(with("\"vocab_size\": 96", "\"vocab_size\": 9223372036854775807"), "vocab_size = 9223372036854775807");
  CHECK_SAYS(with("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1000000"), "num_hidden_layers = 1000000");
  CHECK_SAYS(with("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3"), "9 tensors missing", "model.layers.2.self_attn.q_proj.weight is missing");
  CHECK_SAYS(with("\"max_position_embeddings\": 256", "\"max_position_embeddings\": 0"), "max_position_embeddings = 0");
  CHECK_SAYS(with("\"max_position_embeddings\": 256", "\"max_position_embeddings\": 9223372036854775807"), "max_position_embeddings = 9223372036854775807");
  CHECK_SAYS(with("\"rms_norm_eps\": ", "\"rms_norm_eps\": -"), "rms_norm_eps");
  CHECK_SAYS(with("\"model_type\": \"llama\"", "\"model_type\": \"mistral\", \"sliding_window\": -3"), "sliding_window = -3");
  CHECK_SAYS(with("\"tie_word_embeddings\": false", "\"tie_word_embeddings\": 1"), "tie_word_embeddings");

  const auto image_with = [](const char* old_text, const char* new_text) {
    const DamagedLlava directory;
    change_text(directory, "config.json", old_text, new_text);
    return said<m2lm::Error, Vlm>(directory);
  };
  CHECK_SAYS(image_with("\"num_attention_heads\": 3", "\"num_attention_heads\": 5"), "vision_config", "hidden_size 24 is not a multiple of 5");
  CHECK_SAYS(image_with("\"model_type\": \"clip_vision_model\"", "\"model_type\": \"siglip_vision_model\""), "siglip_vision_model", "clip_vision_model is");
  CHECK_SAYS(image_with("\"vision_feature_layer\": -2", "\"vision_feature_layer\": -9"), "feature layer -9", "3 layers");
  CHECK_SAYS(image_with("\"default\"", "\"middle\""), "vision_feature_select_strategy", "\"middle\" is not supported");
  CHECK_SAYS(image_with("\"projector_hidden_act\": \"gelu\"", "\"projector_hidden_act\": \"maxout\""), "maxout");
  CHECK_SAYS(image_with("\"patch_size\": 14", "\"patch_size\": 29"), "29", "28");
  CHECK_SAYS(image_with("\"patch_size\": 14", "\"patch_size\": 0"), "patch_size = 0");
  CHECK_SAYS(image_with("\"image_size\": 28", "\"image_size\": 42"), "position_embedding.weight is [5, 24]", "expected [10, 24]");
}

TEST_CASE("the chat template: one of a list, and never chosen by a parent directory's name") {
  const auto name_of = [](const std::string& directory) { return std::string(Lm::from_pretrained(directory, Cpu({.threads = 1})).chat_template().name); };
  const Damaged directory;
  CHECK(name_of(directory.path()) == "plain");
  const std::string inside = directory / "vicuna";
  std::filesystem::create_directories(inside + "/stories");
  t::write_synthetic_llama(inside + "/stories");
  CHECK(name_of(inside + "/stories/") == "plain");

  const char* mistral = R"({"name": "NAME", "template": "[INST] {{ message }} [/INST]"})";
  const auto list = [&](std::string_view name) {
    std::string text = mistral;
    text.replace(text.find("NAME"), 4, name);
    return "{\"chat_template\": [" + text + "]}";
  };
  directory.write("tokenizer_config.json", list("default"));
  CHECK(name_of(directory.path()) == "mistral");
  directory.write("tokenizer_config.json", list("tool_use"));
  CHECK_SAYS(said(directory), "tokenizer_config.json", "chat_template", "none of the templates is called \"default\"");
}

// ---- options and memory ------------------------------------------------------------------------------------------------------------------

TEST_CASE("an unknown template lists the known ones") {
  const Damaged directory;
  const auto check = [](const std::string& message) { CHECK_SAYS(message, "martian", "vicuna_v1", "llama-2", "mistral", "plain", "user_assistant"); };
  check(said<m2lm::OptionError>(directory, {.template_name = "martian"}));
  const Vlm model = Vlm::from_pretrained(golden("llava/with_tokenizer"));
  auto prompt = model.prompt("Hello");
  prompt.template_name = "martian";
  check(message_of<m2lm::OptionError>([&] { model.generate(prompt); }));
  prompt.template_name = "plain";
  CHECK(model.input_ids(prompt) != model.input_ids(model.prompt("Hello")));
  CHECK(Vlm::from_pretrained(golden("llava/with_tokenizer"), Cpu(), {.template_name = "plain"}).input_ids(model.prompt("Hello")) == model.input_ids(prompt));
}

TEST_CASE("too little memory is said before any work, with the numbers") {
  const TemporaryDirectory directory;
  m2lm::LlamaConfig config = t::small_llama();
  config.vocab_size = 20000;
  config.hidden_size = 64;
  t::write_synthetic_llama(directory.path(), config);
  // The head of 20000 x 64: 5.1 MB in f32, half of that in bf16. (The table is read where it lies.)
  int steps = 0;
  const auto count = [&](double) { ++steps; };
  const std::string message = said<m2lm::CapacityError>(directory, {.progress = count, .memory_limit = 3 << 20});
  CHECK_SAYS(message, directory.path().c_str(), "needs about 5 MiB", "in f32", "3 MiB are available", "smaller precision");
  CHECK(steps == 0);
  CHECK_NOTHROW(Lm::from_pretrained(directory.path(), Cpu(), {.precision = Precision{.weights = DType::bf16}, .progress = count, .memory_limit = 3 << 20}));
  CHECK(steps > 0);
}

TEST_CASE("progress goes from above 0 to 1, never back") {
  const DamagedLlava directory;
  std::vector<double> seen;
  const auto note = [&](double fraction) { seen.push_back(fraction); };
  Vlm::from_pretrained(directory.path(), Cpu(), {.progress = note});
  REQUIRE(seen.size() > 2);
  CHECK(seen.front() > 0);
  CHECK(seen.back() == 1);
  CHECK(std::is_sorted(seen.begin(), seen.end()));
}

TEST_CASE("formats that the backend has not") {
  const Damaged directory;
  for (const DType format : {DType::f16, DType::i8, DType::f64}) {
    const std::string name(m2lm::dtype_name(format));
    CHECK_SAYS((said<m2lm::OptionError>(directory, {.precision = Precision{.weights = format}})), name.c_str(), "bf16");
    CHECK_SAYS((said<m2lm::OptionError>(directory, {.precision = Precision{.weights = DType::f32, .lm_head = format}})), name.c_str(), "bf16");
    CHECK_SAYS((said<m2lm::OptionError>(directory, {.precision = Precision{.weights = DType::f32, .kv_cache = format}})), name.c_str(), "KV cache", "bf16");
  }
  CHECK_SAYS(message_of<m2lm::OptionError>([] { Cpu backend({.threads = -1}); }), "threads = -1");
}

TEST_CASE("a context that no memory could hold is an error with its size") {
  const Damaged directory;
  change_text(directory, "config.json", "\"max_position_embeddings\": 256", "\"max_position_embeddings\": 1073741824");
  const Lm model = Lm::from_pretrained(directory.path());
  // 2^30 positions of 2 heads in padded rows: some systems promise even that; then only the length counts.
  const std::string message = message_of<m2lm::CapacityError>([&] { model.session(); });
  if (!message.empty()) CHECK_SAYS(message, "1073741824 positions", "MiB");
  CHECK(model.session({.max_positions = 100}).max_positions() == 100);
  CHECK(model.logits(model.prompt(some_ids(4, 96))).shape() == Shape{4, 96});
}

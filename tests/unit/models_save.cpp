// save_pretrained and from_config: what is written is what was loaded, under the same names, and replaces an old directory whole.
#include "models_support.hpp"

#include <cmath>
#include <set>

namespace {

using namespace m2lm_test;
namespace fs = std::filesystem;

std::set<std::string> names_in(const std::string& directory) {
  const auto names = m2lm::Checkpoint::open(directory).names();
  return {names.begin(), names.end()};
}

std::set<std::string> files_in(const std::string& directory) {
  std::set<std::string> out;
  for (const auto& entry : fs::directory_iterator(directory)) out.insert(entry.path().filename().string());
  return out;
}

bool same_tensor(const AnyTensor& a, const AnyTensor& b) {
  return a.dtype() == b.dtype() && a.shape() == b.shape() && std::equal(a.data(), a.data() + a.bytes(), b.data());
}

void check_same_tensors(const std::string& a, const std::string& b) {
  const m2lm::Checkpoint left = m2lm::Checkpoint::open(a), right = m2lm::Checkpoint::open(b);
  CHECK(names_in(a) == names_in(b));
  for (const std::string& name : left.names()) {
    REQUIRE_MESSAGE(right.find(name) != nullptr, name);
    CHECK_MESSAGE(same_tensor(*left.find(name), *right.find(name)), name);
  }
}

template <class M>
Tensor<float> some_logits(const M& model) {
  return model.logits(model.prompt(some_ids(11, model.decoder_config().vocab_size - 1)));
}

TEST_CASE("load, save, load: the same names, the same bits, the same logits") {
  for (const char* name : {"llama/mha_plain", "llama/gqa_linear_tied_sharded", "llama/gqa_llama3_tied_f16", "llama/mha_wide_heads_bf16"}) {
    CAPTURE(name);
    const TemporaryDirectory directory;
    const std::string out = directory / "saved";
    const Lm model = Lm::from_pretrained(golden(name));
    model.save_pretrained(out);
    check_same_tensors(golden(name), out);
    CHECK(same_bits(some_logits(model), some_logits(Lm::from_pretrained(out))));
    CHECK(files_in(directory.path()) == std::set<std::string>{"saved"});
  }
  for (const char* name : {"llava/old_keys_m2_default", "llava/new_keys_m1_full", "llava/saved_keys_mistral_p1_default", "llava/with_tokenizer"}) {
    CAPTURE(name);
    const TemporaryDirectory directory;
    const std::string out = directory / "saved";
    const Vlm model = Vlm::from_pretrained(golden(name));
    model.save_pretrained(out);
    // Blocks behind the chosen layer are not in the model, but they are in the directory.
    check_same_tensors(golden(name), out);
    CHECK(same_bits(some_logits(model), some_logits(Vlm::from_pretrained(out))));
  }
}

TEST_CASE("what goes with the tensors is saved: tokenizer, preprocessor, template; config.json names the dtype") {
  const TemporaryDirectory directory;
  const std::string out = directory / "saved", from = golden("llava/with_tokenizer");
  const Vlm model = Vlm::from_pretrained(from);
  model.save_pretrained(out);
  for (const char* name : {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json",
                           "preprocessor_config.json", "processor_config.json", "chat_template.json"})
    CHECK_MESSAGE(m2lm::read_file(m2lm::join_path(out, name)) == m2lm::read_file(m2lm::join_path(from, name)), std::string(name));
  CHECK(files_in(out).count("golden.json") == 0);
  const auto key = [](const std::string& path) {
    const auto config = m2lm::ConfigValue::parse_file(path + "/config.json");
    return config.has_value("torch_dtype") ? config.get<std::string>("torch_dtype") : config.get<std::string>("dtype");
  };
  CHECK(key(out) == "float32");
  const TemporaryDirectory other;
  const Lm lm = Lm::from_pretrained(golden("llama/mha_wide_heads_bf16"));
  lm.save_pretrained(other / "same");
  CHECK(key(other / "same") == "bfloat16");
  lm.save_pretrained(other / "wide", {.dtype = DType::f32});
  CHECK(key(other / "wide") == "float32");  // transformers would read it in bf16 otherwise
  CHECK(same_bits(some_logits(lm), some_logits(Lm::from_pretrained(other / "wide"))));
  lm.save_pretrained(other / "half", {.dtype = DType::f16});
  CHECK(key(other / "half") == "float16");
  CHECK(m2lm::Checkpoint::open(other / "half").find("model.norm.weight")->dtype() == DType::f16);
  CHECK(has(message_of<m2lm::OptionError>([&] { lm.save_pretrained(other / "bad", {.dtype = DType::i8}); }), "i8"));
}

TEST_CASE("LLaVA's own layout is saved in transformers' words") {
  const TemporaryDirectory directory;
  const Vlm model = Vlm::from_pretrained(golden("native/inside"));
  model.save_pretrained(directory / "saved");
  for (const std::string& name : names_in(directory / "saved"))
    CHECK_MESSAGE((name.starts_with("language_model.model.") || name == "language_model.lm_head.weight" || name.starts_with("vision_tower.vision_model.") ||
                   name.starts_with("multi_modal_projector.linear_")),
                  name);
  const Vlm again = Vlm::from_pretrained(directory / "saved");
  auto prompt = model.prompt("<image>\nWhat?");
  m2lm::Image image{.width = 40, .height = 30, .pixels = std::vector<std::uint8_t>(3600)};
  for (std::size_t i = 0; i < image.pixels.size(); ++i) image.pixels[i] = static_cast<std::uint8_t>(i * 7);
  prompt.attach<"image">(image);
  CHECK(same_bits(model.logits(prompt), again.logits(prompt)));
}

TEST_CASE("shards with an index, and back to one file") {
  const TemporaryDirectory directory;
  const std::string out = directory / "saved";
  const Lm model = Lm::from_pretrained(golden("llama/mha_plain"));
  model.save_pretrained(out, {.max_shard_bytes = 30000});
  const std::set<std::string> files = files_in(out);
  CHECK(files.count("model.safetensors.index.json") == 1);
  CHECK(files.count("model.safetensors") == 0);
  CHECK(files.size() > 4);
  check_same_tensors(golden("llama/mha_plain"), out);
  for (const std::string& file : files)
    if (file.ends_with(".safetensors")) CHECK(fs::file_size(out + "/" + file) < 34000);
  const Lm sharded = Lm::from_pretrained(out);
  CHECK(same_bits(some_logits(model), some_logits(sharded)));
  // Over itself: the mapped shards go, their bytes stay readable as long as the model lives.
  sharded.save_pretrained(out);
  CHECK(files_in(out) == std::set<std::string>{"config.json", "generation_config.json", "model.safetensors"});
  CHECK(same_bits(some_logits(model), some_logits(Lm::from_pretrained(out))));
}

TEST_CASE("an old directory: what belongs to its checkpoint goes, the rest stays") {
  const TemporaryDirectory directory;
  const std::string out = directory / "saved";
  fs::create_directories(out + "/pictures");
  for (const char* name : {"notes.txt", "tokenizer.json", "model-00001-of-00002.safetensors", "pictures/0.png"}) directory.write(std::string("saved/") + name, name);
  const Lm model = Lm::from_pretrained(golden("llama/mha_plain"));
  model.save_pretrained(out + "/");
  CHECK(files_in(out) == std::set<std::string>{"config.json", "generation_config.json", "model.safetensors", "notes.txt", "pictures"});
  CHECK(m2lm::read_file(out + "/notes.txt") == "notes.txt");
  CHECK(m2lm::read_file(out + "/pictures/0.png") == "pictures/0.png");
  CHECK(files_in(directory.path()) == std::set<std::string>{"saved"});
}

TEST_CASE("a save that fails leaves nothing, and what was there") {
  const TemporaryDirectory directory;
  const Lm model = Lm::from_pretrained(golden("llama/mha_plain"));
  CHECK(has(message_of<m2lm::InputError>([&] { model.save_pretrained(directory / "no/such/place"); }), "no/such"));
  directory.write("file", "text");
  CHECK(has(message_of<m2lm::InputError>([&] { model.save_pretrained(directory / "file"); }), "is a file"));
  CHECK(has(message_of<m2lm::InputError>([&] { model.save_pretrained("."); }), "by its name"));
  CHECK(has(message_of<m2lm::InputError>([&] { model.save_pretrained(""); }), "by its name"));
  CHECK(files_in(directory.path()) == std::set<std::string>{"file"});
}

m2lm::ConfigValue config_of(const char* name) { return m2lm::ConfigValue::parse_file(golden(name) + "/config.json"); }

TEST_CASE("from_config: seeded, as transformers initialises, and complete") {
  const TemporaryDirectory directory;
  const auto make = [&](std::uint64_t seed) { return Vlm::from_config(config_of("llava/old_keys_m2_default"), seed); };
  const Vlm model = make(5);
  CHECK(same_bits(some_logits(model), some_logits(make(5))));
  CHECK(!same_bits(some_logits(model), some_logits(make(6))));
  const std::string out = directory / "saved";
  model.save_pretrained(out);
  // The names of a LLaVA checkpoint, with those of the blocks behind the chosen layer.
  CHECK(names_in(out) == names_in(golden("llava/old_keys_m2_default")));
  CHECK(same_bits(some_logits(model), some_logits(Vlm::from_pretrained(out))));
  const m2lm::Checkpoint saved = m2lm::Checkpoint::open(out);
  const auto deviation = [&](const char* name) {
    const AnyTensor& t = *saved.find(name);
    double sum = 0, squares = 0;
    const auto n = static_cast<double>(t.shape().elements());
    for (std::int64_t i = 0; i < t.shape().elements(); ++i) {
      sum += t.at(i);
      squares += t.at(i) * t.at(i);
    }
    return std::pair{sum / n, std::sqrt(squares / n)};
  };
  const auto close = [&](const char* name, double expected) {
    const auto n = static_cast<double>(saved.find(name)->shape().elements());
    const std::pair<double, double> moments = deviation(name);
    const double mean = moments.first, root = moments.second;
    // Five standard errors of a mean and of a standard deviation.
    CHECK_MESSAGE(std::abs(mean) < 5 * expected / std::sqrt(n), std::string(name), " mean ", mean);
    CHECK_MESSAGE(std::abs(root - expected) < 5 * expected / std::sqrt(2 * n), std::string(name), " deviation ", root);
  };
  const double width = 24, layers = static_cast<double>(config_of("llava/old_keys_m2_default")["vision_config"].get<int>("num_hidden_layers"));
  close("language_model.model.embed_tokens.weight", 0.02);
  close("language_model.model.layers.1.mlp.down_proj.weight", 0.02);
  close("multi_modal_projector.linear_2.weight", 0.02);
  close("vision_tower.vision_model.embeddings.class_embedding", 1 / std::sqrt(width));
  close("vision_tower.vision_model.embeddings.patch_embedding.weight", 0.02);
  close("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight", 1 / std::sqrt(2 * width * layers));
  close("vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.weight", 1 / std::sqrt(width));
  close("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", 1 / std::sqrt(2 * width));
  CHECK(deviation("language_model.model.norm.weight") == std::pair{1.0, 1.0});
  CHECK(deviation("vision_tower.vision_model.post_layernorm.bias") == std::pair{0.0, 0.0});
  CHECK(deviation("multi_modal_projector.linear_1.bias") == std::pair{0.0, 0.0});
}

TEST_CASE("from_config: a tokenizer from a directory, or none") {
  const std::string with = golden("llava/with_tokenizer");
  const Vlm model = Vlm::from_config(config_of("llava/with_tokenizer"), 1, Cpu{}, {.tokenizer_directory = with});
  CHECK(model.tokenizer().vocab_size() == Vlm::from_pretrained(with).tokenizer().vocab_size());
  const Vlm bare = Vlm::from_config(config_of("llava/with_tokenizer"), 1);
  CHECK(!message_of<m2lm::InputError>([&] { bare.tokenizer(); }).empty());
  CHECK(same_bits(some_logits(model), some_logits(bare)));
  CHECK(has(message_of<m2lm::CheckpointError>([&] { Vlm::from_config(config_of("llava/with_tokenizer"), 1, Cpu{}, {.tokenizer_directory = "/no/such"}); }),
            "/no/such"));
}

// tests/golden/train/check_saved.py sets the variable and compares what it finds there with transformers.
TEST_CASE("directories for transformers") {
  const std::string out = environment("M2LM_SAVED_DIR", "");
  if (out.empty()) return;
  const auto write = [&](const auto& model, const std::string& name, const m2lm::SaveOptions& options, const Tensor<float>& pixels) {
    const std::string directory = m2lm::join_path(out, name);
    model.save_pretrained(directory, options);
    auto prompt = model.prompt(some_ids(9, model.decoder_config().vocab_size - 6));
    std::vector<m2lm::NamedTensor> tensors;
    if constexpr (std::tuple_size_v<decltype(prompt.attachments)> != 0) {
      const std::int32_t image = model.template placeholder_id<"image">();
      if (image >= 0) {  // LLaVA's own layout has no such token: a prompt of text
        const auto tokens = static_cast<std::size_t>(std::get<0>(m2lm::detail::ModelAccess::state(model).component).encoder.tokens());
        prompt.ids.insert(prompt.ids.begin() + 4, tokens, image);
        const auto& component = std::get<0>(m2lm::detail::ModelAccess::state(model).component);
        m2lm::Arena arena;
        m2lm::Context<Cpu> ctx{model.backend(), arena};
        Tensor<float> features(Shape{static_cast<std::int64_t>(tokens), component.encoder.width()}), rows(Shape{static_cast<std::int64_t>(tokens), model.decoder_config().hidden_size});
        component.encoder.forward(ctx, pixels, features.view<2>());
        component.projector.forward(ctx, features.view<2>(), rows.view<2>());
        prompt.template attach_embeddings<"image">(AnyTensor(std::move(rows)));
        tensors.push_back({"pixel_values", AnyTensor(pixels.clone())});
      }
    }
    Tensor<std::int32_t> ids(Shape{static_cast<std::int64_t>(prompt.ids.size())});
    std::copy(prompt.ids.begin(), prompt.ids.end(), ids.data());
    tensors.push_back({"input_ids", AnyTensor(std::move(ids))});
    tensors.push_back({"logits", AnyTensor(model.logits(prompt))});
    m2lm::write_safetensors(m2lm::join_path(out, name + ".safetensors"), tensors);
  };
  Tensor<float> pixels(Shape{3, 28, 28});
  m2lm::Rng rng(3);
  for (float& x : pixels.span()) x = static_cast<float>(2 * rng.uniform() - 1);
  for (const char* name : {"mha_plain", "gqa_linear_tied_sharded", "mha_wide_heads_bf16", "mistral_window"})
    write(Lm::from_pretrained(golden(std::string("llama/") + name)), name, {}, pixels);
  write(Lm::from_pretrained(golden("llama/mha_plain")), "mha_plain.shards", {.max_shard_bytes = 30000}, pixels);
  write(Lm::from_config(config_of("llama/gqa_llama3_tied_f16"), 3), "from_config.llama", {}, pixels);
  for (const char* name : {"old_keys_m2_default", "new_keys_m1_full", "saved_keys_mistral_p1_default"})
    write(Vlm::from_pretrained(golden(std::string("llava/") + name)), name, {}, pixels);
  write(Vlm::from_pretrained(golden("native/inside")), "native", {}, pixels);
  write(Vlm::from_config(config_of("llava/old_keys_m2_default"), 3), "from_config.llava", {}, pixels);
  write(Vlm::from_config(config_of("llava/saved_keys_mistral_p1_default"), 4), "from_config.mistral", {}, pixels);
}

}  // namespace

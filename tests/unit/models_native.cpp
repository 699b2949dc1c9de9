// LLaVA's own layout: the same logits as transformers gives for the same weights in its own, from text with pictures in it.
#include "models_support.hpp"

#include <cmath>
#include <cstdio>

using namespace m2lm_test;  // NOLINT: a test
using m2lm::CheckpointError;
using m2lm::LoadOptions;

namespace {

template <class B, int Layers>
using Native = m2lm::Model<B, in_f32, m2lm::LlamaDecoder<>, m2lm::Modality<"image", m2lm::ClipVit<>, m2lm::MlpProjector<Layers>>>;

/// f32 on both sides, sums of at most 24 terms, two blocks in the tower and two in the decoder.
const double tolerance = m2lm::testing::network_tolerance(m2lm::testing::epsilon_f32, m2lm::testing::epsilon_f32, 24, 4);

template <class M>
void check_native(const M& model, const std::string& directory, const std::string& what) {
  const m2lm::ConfigValue json = m2lm::ConfigValue::parse_file(directory + "/golden.json");
  const Safetensors record = Safetensors::open(directory + "/golden.safetensors");
  const m2lm::Image picture = m2lm::load_image(golden("llava/with_tokenizer/picture.png"));
  CHECK_MESSAGE(model.load_report().string().empty(), model.load_report().string());
  const auto pictures = json.get<int>("pictures");
  M2LM_CHECK_CLOSE(model.template encode<"image">(picture), record.tensor("features"), tolerance, what + " features");

  // Ids of LLaVA's tokenizer_image_token: -200 where a picture stands.
  const auto ids = json.get_list<std::int32_t>("ids");
  CHECK(model.template placeholder_id<"image">() == -200);
  auto by_ids = model.prompt(ids);
  auto by_text = model.prompt(json.get<std::string>("question"));
  auto raw = model.raw_prompt(json.get<std::string>("prompt"));
  for (int i = 0; i < pictures; ++i) {
    by_ids.template attach<"image">(picture);
    by_text.template attach<"image">(picture);
    raw.template attach<"image">(picture);
  }
  std::vector<std::int32_t> expanded;
  for (const std::int32_t id : ids) expanded.insert(expanded.end(), id == -200 ? json.get<std::size_t>("rows") : 1, id);
  CHECK(model.input_ids(by_ids) == expanded);
  CHECK(model.input_ids(by_text) == expanded);
  CHECK(model.input_ids(raw) == expanded);  // the tokens around <image> are there already

  const auto logits = model.logits(by_text);
  const AnyTensor last = record.tensor("logits");
  const std::int64_t rows = last.shape()[0], begin = logits.shape()[0] - rows;
  Tensor<float> ours(last.shape());
  for (std::int64_t i = 0; i < ours.elements(); ++i) ours.data()[i] = static_cast<float>(logits.data()[begin * last.shape()[1] + i]);
  M2LM_CHECK_CLOSE(ours, last, tolerance, what + " logits");
  CHECK(same_bits(model.logits(by_ids), logits));

  // A picture's rows have an id outside the vocabulary; the sampler meets it in the history.
  const auto answer = model.generate(by_text, {.max_new_tokens = 4, .repetition_penalty = 1.3, .ignore_eos = true});
  CHECK(answer.tokens.size() == 4);
}

std::string native(const char* name) { return golden(std::string("native/") + name); }
const std::string towers = golden("native/towers");

}  // namespace

TEST_CASE("tower inside pytorch_model.bin, its config in a sub-directory; padding, mlp2x_gelu, <im_start> and <im_end>") {
  const std::string directory = native("inside");
  for (const IsaLevel level : isa_levels())
    check_native(Native<Cpu, 2>::from_pretrained(directory, cpu_at(level)), directory, "inside " + std::string(m2lm::isa_name(level)));
  check_native(Native<m2lm::Reference<double>, 2>::from_pretrained(directory), directory, "inside double");
  const auto model = Native<Cpu, 2>::from_pretrained(directory);
  CHECK(model.chat_template().name == "vicuna_v1");
  const auto pixels = m2lm::preprocess(m2lm::load_image(golden("llava/with_tokenizer/picture.png")),
                                       m2lm::read_image_processor_config(model.config()["image_processor_config"], 28));
  M2LM_CHECK_CLOSE(pixels, Safetensors::open(directory + "/golden.safetensors").tensor("pixel_values"), 1e-6, "pixel_values");
}

TEST_CASE("tower in a directory of its own: Mistral, one linear layer, CLS kept, two pictures in the middle of a sentence") {
  const std::string directory = native("apart");
  for (const std::string& tower : {towers, towers + "/clip-vit-tiny-patch14"})
    check_native(Native<Cpu, 1>::from_pretrained(directory, Cpu(), {.vision_tower = tower}), directory, "apart");
  CHECK(Native<Cpu, 1>::from_pretrained(directory, Cpu(), {.vision_tower = towers}).chat_template().name == "mistral");

  // The same tower inside the checkpoint's directory is found without an option.
  const TemporaryDirectory copy;
  copy_directory(directory, copy);
  for (const char* place : {"clip-vit-tiny-patch14", "vision_tower"}) {
    std::filesystem::create_directory(copy / place);
    for (const char* file : {"config.json", "model.safetensors", "preprocessor_config.json"})
      std::filesystem::copy_file(towers + "/clip-vit-tiny-patch14/" + file, copy / place + "/" + file);
    check_native(Native<Cpu, 1>::from_pretrained(copy.path()), directory, place);
    std::filesystem::remove_all(copy / place);
  }
}

TEST_CASE("a tower that is not there, and one that would lead outside") {
  const TemporaryDirectory dir;
  std::filesystem::create_directory(dir / "model");
  const TemporaryDirectory copy;
  copy_directory(native("apart"), copy);
  const auto message = [&](const LoadOptions& options = {}) {
    return message_of<CheckpointError>([&] { (void)Native<Cpu, 1>::from_pretrained(copy.path(), Cpu(), options); });
  };
  CHECK(has(message(),
            "config.json: mm_vision_tower is \"openai/clip-vit-tiny-patch14\", whose sizes are not known and which is not in " + copy.path()));
  CHECK(has(message(), "LoadOptions::vision_tower"));
  const std::string nowhere = dir / "model";
  CHECK(has(message({.vision_tower = nowhere}),
            "no vision tower is in " + nowhere + ": neither it nor " + nowhere + "/clip-vit-tiny-patch14 has a config.json"));
  // A known tower has known sizes, but its weights must be somewhere.
  change_text(copy, "config.json", "clip-vit-tiny-patch14", "clip-vit-large-patch14-336");
  CHECK(has(message(), "mm_hidden_size is 12, but the vision tower has hidden_size 1024"));
  change_text(copy, "config.json", "\"mm_hidden_size\": 12", "\"mm_hidden_size\": 1024");
  CHECK(has(message(), "holds no vision tower, and"));
  // Names that lead elsewhere lose all but their last part.
  for (const std::string& name : {towers + "/clip-vit-tiny-patch14", "../../" + towers + "/clip-vit-tiny-patch14/", std::string("..")}) {
    const TemporaryDirectory other;
    copy_directory(native("apart"), other);
    change_text(other, "config.json", "openai/clip-vit-tiny-patch14", name);
    CHECK(has(message_of<CheckpointError>([&] { (void)Native<Cpu, 1>::from_pretrained(other.path()); }), "whose sizes are not known"));
  }
}

TEST_CASE("sizes of the towers that LLaVA names") {
  const m2lm::ConfigValue root = m2lm::ConfigValue::parse_text(
      R"({"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024, "hidden_size": 4096})",
      "c.json");
  const m2lm::ConfigValue config = m2lm::detail::translate_llava_config(root, "none", "");
  m2lm::ClipVisionConfig vision;
  read_config(config, vision);
  CHECK(vision.hidden_size == 1024);
  CHECK(vision.num_layers == 24);
  CHECK(vision.num_heads == 16);
  CHECK(vision.intermediate_size == 4096);
  CHECK(vision.image_size == 336);
  CHECK(vision.patch_size == 14);
  CHECK(vision.feature_layer == -2);
  CHECK(vision.features == m2lm::VitFeatures::patches);
  m2lm::LlamaConfig text;
  read_config(config, text);
  CHECK(text.hidden_size == 4096);
}

TEST_CASE("native keys that are not supported are named") {
  const auto message = [](const char* old_text, const char* new_text, const std::string& from = native("inside")) {
    const TemporaryDirectory copy;
    std::filesystem::copy(from, copy.path(), std::filesystem::copy_options::recursive);
    change_text(copy, "config.json", old_text, new_text);
    return message_of<CheckpointError>([&] { (void)Native<Cpu, 2>::from_pretrained(copy.path()); });
  };
  CHECK(has(message("\"image_aspect_ratio\": \"pad\"", "\"image_aspect_ratio\": \"anyres\""),
            "image_aspect_ratio \"anyres\" is not supported; pad and square are"));
  CHECK(has(message("\"patch\"", "\"tokens\""), "mm_vision_select_feature \"tokens\" is not supported"));
  CHECK(has(message("mlp2x_gelu", "linear"), "m2lm::MlpProjector<2>: the checkpoint's projector has 1 layers; use MlpProjector of that depth"));
  CHECK(has(message("mlp2x_gelu", "identity"), "has 0 layers; use IdentityProjector"));
  CHECK(has(message("mlp2x_gelu", "qformer"), "mm_projector_type \"qformer\" is not supported"));
  CHECK(
      has(message("\"model_type\": \"llava\"", "\"model_type\": \"llava_mpt\""), "model_type \"llava_mpt\" of LLaVA's own layout is not supported"));
  CHECK(has(message("\"mm_hidden_size\": 12", "\"mm_hidden_size\": 13"), "mm_hidden_size is 13, but the vision tower has hidden_size 12"));
  const TemporaryDirectory copy;
  std::filesystem::copy(native("inside"), copy.path(), std::filesystem::copy_options::recursive);
  change_text(copy, "added_tokens.json", "<im_start>", "<im_begin>");
  change_text(copy, "tokenizer_config.json", "<im_start>", "<im_begin>");
  CHECK(has(message_of<CheckpointError>([&] { (void)Native<Cpu, 2>::from_pretrained(copy.path()); }),
            "config.json says mm_use_im_start_end, but \"<im_start>\" is no token of the tokenizer"));
}

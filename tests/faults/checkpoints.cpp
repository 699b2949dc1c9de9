// Probe: PyTorch files, LLaVA's own layout and adapters.
#include <m2lm/m2lm.hpp>

#include <doctest/doctest.h>

#include <support.hpp>

#include <cstring>

using m2lm_test::golden;

TEST_CASE("a transposed tensor is read in order, a damaged pickle is refused") {
  const m2lm::PytorchFile file = m2lm::PytorchFile::open(golden("pytorch/layouts.bin"));
  const m2lm::AnyTensor recorded = m2lm::Safetensors::open(golden("pytorch/layouts.safetensors")).tensor("transposed");
  CHECK(std::memcmp(file.tensor("transposed").data(), recorded.data(), recorded.bytes()) == 0);
  std::string bytes = m2lm::read_file(golden("pytorch/layouts.bin"));
  const std::size_t name = bytes.find("transposed");
  REQUIRE(name != std::string::npos);
  bytes[name] = 'T';
  const m2lm_test::TemporaryDirectory dir;
  const std::string path = dir.write("x.bin", bytes);
  CHECK_THROWS_AS((void)m2lm::PytorchFile::open(path), m2lm::CheckpointError);
}

TEST_CASE("LLaVA's image_aspect_ratio is followed") {
  const std::string directory = golden("native/inside");
  const m2lm::ConfigValue config = m2lm::detail::translate_llava_config(m2lm::ConfigValue::parse_file(directory + "/config.json"), directory,
                                                                        m2lm::join_path(directory, "clip-vit-tiny-patch14"));
  CHECK(m2lm::read_image_processor_config(config["image_processor_config"], 28).pad_to_square);
}

TEST_CASE("an adapter's update is scaled") {
  const m2lm::Safetensors adapter = m2lm::Safetensors::open(golden("adapters/attention/adapter_model.safetensors"));
  const m2lm::Parameter q(m2lm::Shape{32, 32});
  std::vector<m2lm::detail::NamedParameter> parameters;
  std::vector<m2lm::Parameter> all(6, q);
  for (std::size_t i = 0; i < all.size(); ++i) {
    all[i].value = m2lm::AnyTensor(m2lm::Tensor<float>(q.shape));
    parameters.push_back({"model.layers." + std::to_string(i / 2) + ".self_attn." + (i % 2 ? "v_proj" : "q_proj") + ".weight", &all[i]});
  }
  m2lm::detail::apply_adapter(parameters, golden("adapters/attention"), m2lm::AdapterMode::merge, m2lm::hugging_face_names, {});
  const m2lm::AnyTensor a = adapter.tensor("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
                        b = adapter.tensor("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight");
  double sum = 0;
  for (std::int64_t r = 0; r < 4; ++r) sum += b.at(r) * a.at(r * 32);
  CHECK(all[0].value.at(0) == doctest::Approx(sum * 6.0 / 4.0).epsilon(1e-5));  // lora_alpha 6, r 4
}

// Teaches a model a question that it has never seen: "Is it round?", of the pictures in its directory. The vision tower stays as it
// is; the projector and the decoder learn. Then the model is saved, loaded again, and asked.
// usage: finetune [MODEL] [OUT]
#include <m2lm/m2lm.hpp>

#include <cstdio>
#include <exception>
#include <filesystem>
#include <string>
#include <vector>

using Vlm = m2lm::Model<m2lm::Cpu, m2lm::Precision{}, m2lm::LlamaDecoder<>, m2lm::Modality<"image", m2lm::ClipVit<>, m2lm::MlpProjector<2>>>;
using Trainer = m2lm::train::Trainer<Vlm>;
using Example = Trainer::ExampleType;

namespace {

Example example(const Vlm& model, const std::string& picture, const std::string& question, const std::string& answer) {
  Example out{.prompt = model.prompt("<image>\n" + question), .answer = answer};
  out.prompt.attach<"image">(m2lm::load_image(picture));
  return out;
}

// A model of random weights: sizes from a config, the tokenizer from a directory that has one.
Vlm from_nothing(const std::string& directory) {
  const auto config = m2lm::ConfigValue::parse_file(directory + "/config.json");
  return Vlm::from_config(config, /*seed=*/1, m2lm::Cpu{}, {.tokenizer_directory = directory});
}

int run(const std::string& directory, const std::string& out) {
  const Vlm model = Vlm::from_pretrained(directory);

  std::vector<Example> lessons;
  for (const m2lm::ConfigValue& line : m2lm::parse_json_lines(directory + "/questions.jsonl")) {
    if (line.get<std::string>("question") != "What shape is in the image?") continue;
    const bool round = line.get<std::string>("answer") == "circle";
    lessons.push_back(example(model, directory + "/" + line.get<std::string>("image"), "Is it round?", round ? "yes" : "no"));
  }

  constexpr int steps = 30;
  Trainer trainer(model, {.parameters = {.freeze = {"vision_tower.*"}},
                          .schedule = {.peak = 3e-4, .warmup_steps = 3, .decay = m2lm::train::Decay::cosine, .total_steps = steps},
                          .max_gradient_norm = 1.0});
  const double before = trainer.loss(lessons);
  for (int i = 0; i < steps; ++i) {
    const m2lm::train::StepReport report = trainer.step(lessons);
    if (i % 5 == 0) std::printf("step %lld: loss %.4f\n", static_cast<long long>(report.step), report.loss);
  }
  const double after = trainer.loss(lessons);
  std::printf("loss before %.4f, after %.4f; of a model from nothing %.4f\n", before, after, Trainer(from_nothing(directory), {}).loss(lessons));

  model.save_pretrained(out, {.dtype = m2lm::DType::bf16});
  const Vlm learned = Vlm::from_pretrained(out);
  std::size_t right = 0;
  for (const Example& lesson : lessons) right += learned.generate(lesson.prompt, {.max_new_tokens = 4}).text == lesson.answer;
  std::printf("%s answers %zu of %zu rightly\n", out.c_str(), right, lessons.size());
  return after < 0.1 * before && right == lessons.size() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const std::string directory = argc > 1 ? argv[1] : "assets/easy-vqa";
    if (argc > 2) return run(directory, argv[2]);
    const std::string out = (std::filesystem::temp_directory_path() / "m2lm-finetuned").string();
    const int status = run(directory, out);
    std::filesystem::remove_all(out);
    return status;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "finetune: %s\n", error.what());
    return 1;
  }
}

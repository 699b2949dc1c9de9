// Several prompts at once, scores, forks, and a session that is given whole prompts.
#include <m2lm/m2lm.hpp>

#include <cstdio>
#include <string>
#include <vector>

namespace {

using Vlm = m2lm::Model<m2lm::Cpu, m2lm::Precision{}, m2lm::LlamaDecoder<>, m2lm::Modality<"image", m2lm::ClipVit<>, m2lm::MlpProjector<2>>>;

void batch(const Vlm& model, const m2lm::Image& first, const m2lm::Image& second) {
  std::vector<Vlm::PromptType> prompts;
  prompts.push_back(model.prompt("<image>\nwhat shape is in the image?"));
  prompts.back().attach<"image">(first);
  prompts.push_back(model.prompt("<image>\nwhat color is the shape?"));
  prompts.back().attach<"image">(second);

  const std::vector<m2lm::Generation> answers = model.generate(prompts, {.max_new_tokens = 8});
  for (const m2lm::Generation& answer : answers) std::printf("%s\n", answer.text.c_str());
}

void score(const Vlm& model, const m2lm::Image& image) {
  auto prompt = model.prompt("<image>\nwhat shape is in the image?");
  prompt.attach<"image">(image);
  const std::vector<std::string> shapes{"circle", "rectangle", "triangle"};
  const std::vector<m2lm::Score> scores = model.score(prompt, shapes);
  for (std::size_t i = 0; i < shapes.size(); ++i) std::printf("%s: log P = %.3f\n", shapes[i].c_str(), scores[i].log_probability);
}

void fork(const Vlm& model, const m2lm::Image& image) {
  auto opening = model.prompt("<image>\nDescribe the image.");
  opening.attach<"image">(image);
  auto trunk = model.session();
  trunk.generate(opening, {.max_new_tokens = 8});

  auto branch = trunk.fork();  // the picture and the answer so far are not computed again
  for (auto* session : {&trunk, &branch}) {
    const m2lm::Generation answer = session->generate(model.prompt("what shape is in the image?"), {.max_new_tokens = 8});
    std::printf("%s\n", answer.text.c_str());
  }
}

void complete(const Vlm& model, const m2lm::Image& image) {
  auto session = model.session();
  for (const char* question : {"what shape is in the image?", "what color is the shape?"}) {
    auto whole = model.prompt(std::string("<image>\n") + question);
    whole.attach<"image">(image);
    const m2lm::Generation answer = session.complete(whole, {.max_new_tokens = 8});
    std::printf("%s (%lld positions computed)\n", answer.text.c_str(), static_cast<long long>(answer.timings.prefill_tokens));
  }
  std::printf("pictures encoded: %zu, found again: %zu\n", model.media_cache_stats().misses, model.media_cache_stats().hits);
}

}  // namespace

int main() try {
  const Vlm model = Vlm::from_pretrained("assets/easy-vqa");
  const m2lm::Image first = m2lm::load_image("assets/easy-vqa/pictures/0.png"), second = m2lm::load_image("assets/easy-vqa/pictures/1.png");
  batch(model, first, second);
  score(model, first);
  fork(model, first);
  complete(model, second);
} catch (const m2lm::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}

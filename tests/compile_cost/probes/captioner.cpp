// What a user's program costs: the type of a captioner, its load and one answer.
#include <m2lm/m2lm.hpp>

#include <cstdio>

using Vlm = m2lm::Model<m2lm::Cpu, m2lm::Precision{.weights = m2lm::DType::bf16}, m2lm::LlamaDecoder<>,
                        m2lm::Modality<"image", m2lm::ClipVit<>, m2lm::MlpProjector<2>>>;

int main() {
  Vlm model = Vlm::from_pretrained("assets/easy-vqa");
  auto prompt = model.prompt("<image>\nWhat shape is in the image?");
  prompt.attach<"image">(m2lm::load_image("assets/easy-vqa/pictures/0.png"));
  model.generate(prompt, {.max_new_tokens = 64, .on_text = [](std::string_view piece) {
                            std::fwrite(piece.data(), 1, piece.size(), stdout);
                          }});
}

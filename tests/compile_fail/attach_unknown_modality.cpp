// expect: m2lm::Prompt::attach<name>: this model has no component of that name
#include <m2lm/m2lm.hpp>

using Vlm = m2lm::Model<m2lm::Cpu, m2lm::Precision{}, m2lm::LlamaDecoder<>,
                        m2lm::Modality<"image", m2lm::ClipVit<>, m2lm::MlpProjector<2>>>;

void attach(const Vlm& model) {
  auto prompt = model.prompt("<image>\nWhat is this?");
#if defined(M2LM_MUST_FAIL)
  prompt.attach<"sound">(m2lm::load_image("picture.png"));
#else
  prompt.attach<"image">(m2lm::load_image("picture.png"));
#endif
}

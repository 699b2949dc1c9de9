// expect: m2lm::Model::encode<name>: this model has no component of that name
#include <m2lm/m2lm.hpp>

using Vlm = m2lm::Model<m2lm::Reference<float>, m2lm::Precision{}, m2lm::LlamaDecoder<>,
                        m2lm::Modality<"image", m2lm::ClipVit<>, m2lm::IdentityProjector>>;

void encode(const Vlm& model, const m2lm::Image& image) {
#if defined(M2LM_MUST_FAIL)
  model.encode<"depth">(image);
#else
  model.encode<"image">(image);
#endif
}

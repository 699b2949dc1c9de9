// The models of the programs.
#pragma once

#include <m2lm/m2lm.hpp>

namespace program {

/// LLaVA. --precision replaces the precision of the type when the model is loaded.
using Vlm = m2lm::Model<m2lm::Cpu, m2lm::Precision{.weights = m2lm::DType::bf16}, m2lm::LlamaDecoder<>,
                        m2lm::Modality<"image", m2lm::ClipVit<>, m2lm::MlpProjector<2>>>;
/// The same on a GPU.
using CudaVlm = m2lm::Model<m2lm::Cuda, m2lm::Precision{.weights = m2lm::DType::bf16}, m2lm::LlamaDecoder<>,
                            m2lm::Modality<"image", m2lm::ClipVit<>, m2lm::MlpProjector<2>>>;

}  // namespace program

// nvcc compiles CudaVlm: m2lm_instantiate, in CMakeLists.txt.
M2LM_EXTERN_MODEL(m2lm::Cuda, m2lm::Precision{.weights = m2lm::DType::bf16}, m2lm::LlamaDecoder<>,
                  m2lm::Modality<"image", m2lm::ClipVit<>, m2lm::MlpProjector<2>>);

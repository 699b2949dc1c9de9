// The whole library in one include.
// Floor: m2lm. May include: everything.
#pragma once

#include <m2lm/backends/cuda/cuda.hpp>
#include <m2lm/backends/cuda/training.hpp>
#include <m2lm/core.hpp>
#include <m2lm/io/checkpoint.hpp>
#include <m2lm/io/config.hpp>
#include <m2lm/io/directory.hpp>
#include <m2lm/io/file.hpp>
#include <m2lm/io/gguf.hpp>
#include <m2lm/io/gguf_model.hpp>
#include <m2lm/io/image.hpp>
#include <m2lm/io/image_processor.hpp>
#include <m2lm/io/npy.hpp>
#include <m2lm/io/pickle.hpp>
#include <m2lm/io/pytorch.hpp>
#include <m2lm/io/safetensors.hpp>
#include <m2lm/io/tokenizer.hpp>
#include <m2lm/io/zip.hpp>
#include <m2lm/models/answer.hpp>
#include <m2lm/models/adapter.hpp>
#include <m2lm/models/chat_template.hpp>
#include <m2lm/models/generation.hpp>
#include <m2lm/models/hf_config.hpp>
#include <m2lm/models/insertion.hpp>
#include <m2lm/models/llava_native.hpp>
#include <m2lm/models/loader.hpp>
#include <m2lm/models/media_cache.hpp>
#include <m2lm/models/modality.hpp>
#include <m2lm/models/model.hpp>
#include <m2lm/models/names.hpp>
#include <m2lm/models/packed_cache.hpp>
#include <m2lm/models/prompt.hpp>
#include <m2lm/models/save.hpp>
#include <m2lm/models/sequence.hpp>
#include <m2lm/models/session.hpp>
#include <m2lm/parts/decoders/llama.hpp>
#include <m2lm/parts/encoders/clip_vit.hpp>
#include <m2lm/parts/heads/linear_head.hpp>
#include <m2lm/parts/projectors/mlp_projector.hpp>
#include <m2lm/sampling/options.hpp>
#include <m2lm/sampling/processors.hpp>
#include <m2lm/sampling/stop.hpp>
#include <m2lm/train/adamw.hpp>
#include <m2lm/train/schedule.hpp>
#include <m2lm/train/selection.hpp>
#include <m2lm/train/trainer.hpp>
#include <m2lm/version.hpp>

#if !defined(M2LM_SEPARATE_IMPL)
#include <m2lm/impl.hpp>
#endif

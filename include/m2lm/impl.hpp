// The non-template definitions behind m2lm.hpp: file formats, tokenizers, pictures, kernels. Included at the end of m2lm.hpp, or,
// with M2LM_SEPARATE_IMPL, in one translation unit of the program (m2lm::compiled is that).
// Floor: m2lm. May include: everything.
#pragma once

#include <m2lm/core_impl.hpp>
#include <m2lm/io/file_impl.hpp>
#include <m2lm/io/config_impl.hpp>
#include <m2lm/io/directory_impl.hpp>
#include <m2lm/io/safetensors_impl.hpp>
#include <m2lm/io/gguf_impl.hpp>
#include <m2lm/io/zip_impl.hpp>
#include <m2lm/io/npy_impl.hpp>
#include <m2lm/io/pickle_impl.hpp>
#include <m2lm/io/pytorch_impl.hpp>
#include <m2lm/io/checkpoint_impl.hpp>
#include <m2lm/io/unicode_tables_impl.hpp>
#include <m2lm/io/byte_bpe_impl.hpp>
#include <m2lm/io/tokenizer_impl.hpp>
#include <m2lm/io/gguf_tokenizer_impl.hpp>
#include <m2lm/io/image_impl.hpp>
#include <m2lm/io/image_processor_impl.hpp>
#include <m2lm/io/gguf_model_impl.hpp>
#include <m2lm/models/answer_impl.hpp>
#include <m2lm/models/adapter_impl.hpp>
#include <m2lm/models/chat_template_impl.hpp>
#include <m2lm/models/hf_config_impl.hpp>
#include <m2lm/models/llava_native_impl.hpp>
#include <m2lm/models/loader_impl.hpp>
#include <m2lm/models/media_cache_impl.hpp>
#include <m2lm/models/model_impl.hpp>
#include <m2lm/models/packed_cache_impl.hpp>
#include <m2lm/models/save_impl.hpp>
#include <m2lm/models/sequence_impl.hpp>
#include <m2lm/sampling/options_impl.hpp>
#include <m2lm/sampling/processors_impl.hpp>
#include <m2lm/sampling/stop_impl.hpp>

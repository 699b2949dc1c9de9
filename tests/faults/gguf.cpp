// Probe: GGUF's block formats and the order of its rows.
#include <m2lm/io/checkpoint.hpp>

#include <doctest/doctest.h>

#include <support.hpp>

TEST_CASE("block formats") {
  const m2lm::Gguf file = m2lm::Gguf::open(m2lm_test::golden("gguf/formats.gguf"));
  const m2lm::Safetensors expected = m2lm::Safetensors::open(m2lm_test::golden("gguf/formats.safetensors"));
  for (const char* name : {"Q4_1", "Q4_K"}) {
    const auto a = file.tensor(name).to<float>(), b = expected.tensor(name).to<float>();
    CHECK(std::equal(a.data(), a.data() + a.elements(), b.data()));
  }
}

TEST_CASE("rows of queries and keys") {
  const m2lm::Checkpoint a = m2lm::Checkpoint::open(m2lm_test::golden("gguf/gqa_llama3_tied_f16.gguf"));
  const m2lm::Checkpoint b = m2lm::Checkpoint::open(m2lm_test::golden("llama/gqa_llama3_tied_f16"));
  for (const char* name : {"model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"}) {
    const m2lm::AnyTensor *x = a.find(name), *y = b.find(name);
    REQUIRE((x != nullptr && y != nullptr));
    CHECK((x->bytes() == y->bytes() && std::equal(x->data(), x->data() + x->bytes(), y->data())));
  }
}

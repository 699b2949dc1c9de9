#!/usr/bin/env python3
"""Makes tests/golden/gguf with the PyPI package `gguf` (ggml project): the same models as in tests/golden/llama and llava, as GGUF.

    python make_gguf_goldens.py [--out DIR]

formats.gguf         every block format, of random bytes, and metadata of every value type
formats.safetensors  what gguf.quants makes of them
NAME.gguf            the model of llama/NAME: names, permuted rows of q and k, and metadata as llama.cpp's converter writes them
llava/               llava/with_tokenizer as a text model with its tokenizer, and a CLIP companion (newer names)
legacy/              the same companion under the older names: fc1 is called ffn_down, the last block is left out
tokenizer-NAME.gguf  the vocabulary of bpe/NAME, without tensors
"""
import argparse
import json
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q
from safetensors import safe_open
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parent
FORMATS = [Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K]
# Where the 16-bit scales of a block are, in bytes from its beginning: random bytes there would mostly be huge or not a number.
SCALES = {Q.Q4_0: [0], Q.Q4_1: [0, 2], Q.Q5_0: [0], Q.Q5_1: [0, 2], Q.Q8_0: [0], Q.Q2_K: [80, 82], Q.Q3_K: [108], Q.Q4_K: [0, 2],
          Q.Q5_K: [0, 2], Q.Q6_K: [208]}


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(directory):
    """All tensors of a Hugging Face directory as f32, and the names of those that are stored in bf16 or f16."""
    import torch
    out, kinds = {}, {}
    for path in sorted(directory.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                kinds[name] = {torch.float32: Q.F32, torch.float16: Q.F16, torch.bfloat16: Q.BF16}[tensor.dtype]
                out[name] = tensor.float().numpy()
    return out, kinds


def add(writer, name, values, kind):
    values = np.ascontiguousarray(values, dtype=np.float32)
    if values.ndim <= 1:  # vectors stay in f32, as in llama.cpp's files
        kind = Q.F32
    if kind == Q.F32:
        writer.add_tensor(name, values)
    elif kind == Q.F16:
        writer.add_tensor(name, values.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def formats(out):
    random = np.random.default_rng(20)
    writer = gguf.GGUFWriter(out / "formats.gguf", "test")
    for kind, value in [("uint8", 200), ("int8", -100), ("uint16", 60000), ("int16", -30000), ("uint32", 4000000000), ("int32", -2000000000),
                        ("uint64", 1 << 62), ("int64", -(1 << 62)), ("float32", 0.1), ("float64", 0.1), ("bool", True), ("string", "\u2581h\u00e9 <0x0A>")]:
        getattr(writer, "add_" + kind)("value." + kind, value)
    writer.add_array("value.strings", ["a", "", "\u2581b"])
    writer.add_array("value.floats", [0.5, -2.0])
    writer.add_array("value.bools", [True, False])
    expected = {}
    for kind in FORMATS:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows, blocks = 2, 3 if block == 32 else 2
        data = random.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
        for at in SCALES[kind]:
            data[:, :, at:at + 2] = random.normal(0, 0.1, (rows, blocks)).astype(np.float16).reshape(rows, blocks, 1).view(np.uint8)
        data[0, 0, SCALES[kind][0]:SCALES[kind][0] + 2] = np.array([3e-7], np.float16).view(np.uint8)  # a subnormal scale
        data = data.reshape(rows, blocks * size)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        expected[kind.name] = gguf.quants.dequantize(data, kind)
        assert expected[kind.name].shape == (rows, blocks * block) and np.isfinite(expected[kind.name]).all()
    values = random.normal(0, 1, (3, 5)).astype(np.float32)
    for kind in (Q.F32, Q.F16, Q.BF16):
        add(writer, kind.name, values, kind)
    expected["F32"], expected["F16"] = values, values.astype(np.float16).astype(np.float32)
    expected["BF16"] = gguf.quants.dequantize(gguf.quants.quantize(values, Q.BF16), Q.BF16).reshape(3, 5)
    writer.add_tensor("I32", np.arange(6, dtype=np.int32).reshape(1, 2, 3))
    finish(writer)
    save_file(expected, out / "formats.safetensors")


def permute(weights, heads):
    """Halves of a head (transformers) to neighbours (llama.cpp): row i of the first and row i of the second half follow each other."""
    return weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


TEXT_NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
              "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
              "mlp.down_proj": "ffn_down"}


def text_model(writer, config, tensors, kinds):
    """`tensors` under their names in a text checkpoint: model.…, lm_head.…"""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or rope
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(theta)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if head_dim * heads != config["hidden_size"]:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "llama3":  # llama.cpp keeps the factors, not the rule
        factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
        context = scaling["original_max_position_embeddings"]
        factors = []
        for frequency in theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim):
            wavelength = 2 * np.pi / frequency
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1.0 if wavelength < context / high else factor if wavelength > context / low else 1 / ((1 - smooth) / factor + smooth))
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    for name in sorted(tensors):
        values, parts = tensors[name], name.split(".")
        if name == "model.embed_tokens.weight":
            target = "token_embd.weight"
        elif name == "model.norm.weight":
            target = "output_norm.weight"
        elif name == "lm_head.weight":
            if config.get("tie_word_embeddings"):
                continue
            target = "output.weight"
        else:
            module = ".".join(parts[3:-1])
            if module in ("self_attn.q_proj", "self_attn.k_proj"):
                values = permute(values, heads if module == "self_attn.q_proj" else kv_heads)
            target = f"blk.{parts[2]}.{TEXT_NAMES[module]}.{parts[-1]}"
        add(writer, target, values, kinds[name])


def sentencepiece_vocabulary(writer, path, added, size):
    import sentencepiece
    model = sentencepiece.SentencePieceProcessor(str(path))
    tokens, scores, types = [], [], []
    for i in range(model.get_piece_size()):
        kind = (gguf.TokenType.UNKNOWN if model.is_unknown(i) else gguf.TokenType.CONTROL if model.is_control(i) else
                gguf.TokenType.UNUSED if model.is_unused(i) else gguf.TokenType.BYTE if model.is_byte(i) else gguf.TokenType.NORMAL)
        tokens.append(model.id_to_piece(i))
        scores.append(model.get_score(i))
        types.append(kind)
    for content, kind in added:
        tokens.append(content)
        scores.append(-1000.0)
        types.append(kind)
    for i in range(len(tokens), size):
        tokens.append(f"[PAD{i}]")
        scores.append(-1000.0)
        types.append(gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(True)


VISION_NAMES = {"layer_norm1": "ln1", "layer_norm2": "ln2", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
                "self_attn.out_proj": "attn_out", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}
OUTSIDE = {"embeddings.class_embedding": "v.class_embd", "embeddings.patch_embedding.weight": "v.patch_embd.weight",
           "embeddings.position_embedding.weight": "v.position_embd.weight", "pre_layrnorm.weight": "v.pre_ln.weight", "pre_layrnorm.bias": "v.pre_ln.bias",
           "post_layernorm.weight": "v.post_ln.weight", "post_layernorm.bias": "v.post_ln.bias"}


def companion(path, config, tensors, processor, legacy):
    vision = config["vision_config"]
    layers = vision["num_hidden_layers"]
    feature = config["vision_feature_layer"]
    feature = feature if feature >= 0 else layers + 1 + feature
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    if legacy:
        writer.add_bool("clip.has_text_encoder", False)
        writer.add_bool("clip.has_llava_projector", True)
        writer.add_bool("clip.use_gelu", False)
    else:
        writer.add_array("clip.vision.feature_layer", [feature])
    writer.add_string("clip.projector_type", "mlp")
    writer.add_uint32("clip.vision.image_size", vision["image_size"])
    writer.add_uint32("clip.vision.patch_size", vision["patch_size"])
    writer.add_uint32("clip.vision.embedding_length", vision["hidden_size"])
    writer.add_uint32("clip.vision.feed_forward_length", vision["intermediate_size"])
    writer.add_uint32("clip.vision.projection_dim", vision["projection_dim"])
    writer.add_uint32("clip.vision.attention.head_count", vision["num_attention_heads"])
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision.get("layer_norm_eps", 1e-5))
    writer.add_uint32("clip.vision.block_count", feature if legacy else layers)
    writer.add_array("clip.vision.image_mean", processor["image_mean"])
    writer.add_array("clip.vision.image_std", processor["image_std"])
    for name in sorted(tensors):
        if name.startswith("multi_modal_projector."):
            target = name.replace("multi_modal_projector.linear_1", "mm.0").replace("multi_modal_projector.linear_2", "mm.2")
        else:
            inner = name.removeprefix("vision_tower.vision_model.")
            if inner in OUTSIDE:
                if legacy and inner.startswith("post_"):
                    continue
                target = OUTSIDE[inner]
            else:
                parts = inner.split(".")  # encoder.layers.N.….weight
                if legacy and int(parts[2]) >= feature:
                    continue
                module = VISION_NAMES[".".join(parts[3:-1])]
                if legacy:
                    module = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}.get(module, module)
                target = f"v.blk.{parts[2]}.{module}.{parts[-1]}"
        add(writer, target, tensors[name], Q.F32)
    finish(writer)


def llava(out):
    source = HERE / "llava" / "with_tokenizer"
    config = json.loads((source / "config.json").read_text())
    tensors, _ = load(source)
    text = {n.removeprefix("language_model."): v for n, v in tensors.items() if n.startswith("language_model.")}
    rest = {n: v for n, v in tensors.items() if not n.startswith("language_model.")}
    for name in ("llava", "legacy"):
        (out / name).mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(out / "llava" / "text.gguf", "llama")
    writer.add_name("tiny llava")
    text_model(writer, config["text_config"], text, dict.fromkeys(text, Q.F32))
    sentencepiece_vocabulary(writer, source / "tokenizer.model", [("<image>", gguf.TokenType.CONTROL), ("<pad>", gguf.TokenType.CONTROL)],
                             config["text_config"]["vocab_size"])
    writer.add_pad_token_id(341)
    writer.add_chat_template(json.loads((source / "chat_template.json").read_text())["chat_template"])
    finish(writer)
    processor = json.loads((source / "preprocessor_config.json").read_text())
    companion(out / "llava" / "mmproj.gguf", config, rest, processor, False)
    companion(out / "legacy" / "mmproj.gguf", config, rest, processor, True)


def byte_level(out, name, pre):
    source = json.loads((HERE / "bpe" / name / "tokenizer.json").read_text())
    vocabulary = {i: (t, gguf.TokenType.NORMAL) for t, i in source["model"]["vocab"].items()}
    for token in source["added_tokens"]:
        vocabulary[token["id"]] = (token["content"], gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED)
    tokens = [vocabulary.get(i, (f"[PAD{i}]", gguf.TokenType.UNUSED)) for i in range(max(vocabulary) + 1)]
    writer = gguf.GGUFWriter(out / f"tokenizer-{name}.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([t for t, _ in tokens])
    writer.add_token_types([k for _, k in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in source["model"]["merges"]])
    ids = {t: i for i, (t, _) in enumerate(tokens)}
    for role, content in (("bos", "<|begin|>"), ("eos", "<|end|>")):
        getattr(writer, f"add_{role}_token_id")(ids[content])
    finish(writer)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "gguf")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    formats(out)
    for name in ("gqa_llama3_tied_f16", "mqa_llama3_hd10", "mqa_linear_tied_hd6", "mha_wide_heads_bf16"):
        tensors, kinds = load(HERE / "llama" / name)
        writer = gguf.GGUFWriter(out / f"{name}.gguf", "llama")
        text_model(writer, json.loads((HERE / "llama" / name / "config.json").read_text()), tensors, kinds)
        finish(writer)
    llava(out)
    byte_level(out, "llama3", "llama-bpe")
    byte_level(out, "qwen2", "qwen2")
    for path in sorted(out.rglob("*")):
        if path.is_file():
            print(path.stat().st_size, path.relative_to(out))


if __name__ == "__main__":
    main()

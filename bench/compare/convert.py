#!/usr/bin/env python3
"""The same weights in every peer's own form.

    python convert.py gguf DIR [--quantize]      DIR/model-bf16.gguf, and DIR/model-q8_0.gguf, -q4_0.gguf by llama.cpp's own quantiser
    python convert.py openvino DIR               DIR/ov-{bf16,int8,int4-32,int4-128}: optimum-intel's stateful export, weights by nncf
    python convert.py openvino-clip DIR          DIR/ov-{bf16,int8}: the layers that a LLaVA uses (all but the last)
    python convert.py ctranslate2 DIR            DIR/ct2-int8

Every matrix is quantised, the embedding and the head too (llama.cpp: --pure; nncf: all_layers), so that all read the same bits.
"""

import argparse
import json
import pathlib
import shutil


def gguf(folder, args):
    import gguf as g
    import torch
    from safetensors.torch import load_file
    c = json.loads((folder / "config.json").read_text())
    t = load_file(folder / "model.safetensors")
    w = g.GGUFWriter(folder / args.name, "llama")
    heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_block_count(c["num_hidden_layers"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_rope_dimension_count(head_dim)
    w.add_rope_freq_base(float((c.get("rope_parameters") or c).get("rope_theta", 10000.0)))
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_vocab_size(c["vocab_size"])
    w.add_tokenizer_model("none")
    f32 = args.f32

    def add(name, x):
        if x.dim() == 1 or f32:
            w.add_tensor(name, x.float().numpy())
        else:
            x = x.to(torch.bfloat16).contiguous()
            w.add_tensor(name, x.view(torch.uint8).numpy().reshape(x.shape[0], -1), raw_dtype=g.GGMLQuantizationType.BF16)

    def interleaved(x, n):  # half-split rotation to pairs side by side
        return x.view(n, 2, head_dim // 2, -1).transpose(1, 2).reshape(x.shape)

    add("token_embd.weight", t["model.embed_tokens.weight"])
    add("output_norm.weight", t["model.norm.weight"])
    if "lm_head.weight" in t and not c.get("tie_word_embeddings"):
        add("output.weight", t["lm_head.weight"])
    for i in range(c["num_hidden_layers"]):
        p, b = f"model.layers.{i}.", f"blk.{i}."
        add(b + "attn_q.weight", interleaved(t[p + "self_attn.q_proj.weight"], heads))
        add(b + "attn_k.weight", interleaved(t[p + "self_attn.k_proj.weight"], kv_heads))
        add(b + "attn_v.weight", t[p + "self_attn.v_proj.weight"])
        add(b + "attn_output.weight", t[p + "self_attn.o_proj.weight"])
        add(b + "ffn_gate.weight", t[p + "mlp.gate_proj.weight"])
        add(b + "ffn_up.weight", t[p + "mlp.up_proj.weight"])
        add(b + "ffn_down.weight", t[p + "mlp.down_proj.weight"])
        add(b + "attn_norm.weight", t[p + "input_layernorm.weight"])
        add(b + "ffn_norm.weight", t[p + "post_attention_layernorm.weight"])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def quantize(folder, args):
    import llama_cpp as l
    for name, kind in (("q8_0", l.LLAMA_FTYPE_MOSTLY_Q8_0), ("q4_0", l.LLAMA_FTYPE_MOSTLY_Q4_0)):
        p = l.llama_model_quantize_default_params()
        p.nthread, p.ftype, p.pure = 2, kind, True
        if l.llama_model_quantize(str(folder / args.name).encode(), str(folder / f"model-{name}.gguf").encode(), p) != 0:
            raise SystemExit(f"llama.cpp could not quantise to {name}")


def compress(model, bits, group):
    import nncf
    if bits == 8:
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=group, ratio=1.0, all_layers=True)


def openvino(folder, args):
    import openvino as ov
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig
    out = folder / "ov-bf16"
    shutil.rmtree(out, ignore_errors=True)
    main_export(str(folder), output=str(out), task="text-generation-with-past", framework="pt", stateful=True, convert_tokenizer=False,
                ov_config=OVConfig(dtype="fp16"))
    core = ov.Core()
    for name, bits, group in (("int8", 8, 0), ("int4-32", 4, 32), ("int4-128", 4, 128)):
        (folder / f"ov-{name}").mkdir(exist_ok=True)
        model = compress(core.read_model(out / "openvino_model.xml"), bits, group)
        ov.save_model(model, folder / f"ov-{name}/openvino_model.xml", compress_to_fp16=False)


def openvino_clip(folder, args):
    import nncf
    import openvino as ov
    import torch
    from transformers import CLIPVisionModel

    class Features(torch.nn.Module):  # what a LLaVA takes: the state before the last layer
        def __init__(self):
            super().__init__()
            model = CLIPVisionModel.from_pretrained(folder, dtype=torch.float32).eval()
            self.vision = getattr(model, "vision_model", model)
            self.vision.encoder.layers = self.vision.encoder.layers[:-1]

        def forward(self, pixels):
            x = self.vision.pre_layrnorm(self.vision.embeddings(pixels))
            for layer in self.vision.encoder.layers:
                x = layer(x, None)
                x = x[0] if isinstance(x, tuple) else x
            return x

    c = json.loads((folder / "config.json").read_text())
    shape = [1, 3, c["image_size"], c["image_size"]]
    model = ov.convert_model(Features(), example_input=torch.randn(*shape), input=[ov.PartialShape(shape)])
    for name in ("bf16", "int8", "int8-static"):
        (folder / f"ov-{name}").mkdir(exist_ok=True)
    ov.save_model(model, folder / "ov-bf16/openvino_model.xml", compress_to_fp16=True)
    core = ov.Core()
    ov.save_model(compress(core.read_model(folder / "ov-bf16/openvino_model.xml"), 8, 0), folder / "ov-int8/openvino_model.xml", compress_to_fp16=False)
    torch.manual_seed(2)
    data = nncf.Dataset([torch.randn(*shape).numpy() for _ in range(2)])
    static = nncf.quantize(core.read_model(folder / "ov-bf16/openvino_model.xml"), data, model_type=nncf.ModelType.TRANSFORMER, subset_size=2)
    ov.save_model(static, folder / "ov-int8-static/openvino_model.xml", compress_to_fp16=False)


def ctranslate2(folder, args):
    import ctranslate2 as c
    c.converters.TransformersConverter(str(folder), low_cpu_mem_usage=True).convert(str(folder / "ct2-int8"), quantization="int8", force=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {"gguf": gguf, "quantize": quantize, "openvino": openvino, "openvino-clip": openvino_clip, "ctranslate2": ctranslate2}
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--name", default="model-bf16.gguf", help="gguf, quantize: the file of unquantised weights")
    parser.add_argument("--f32", action="store_true", help="gguf: f32 instead of bf16")
    args = parser.parse_args()
    kinds[args.kind](args.folder, args)


if __name__ == "__main__":
    main()

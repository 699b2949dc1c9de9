#!/usr/bin/env python3
"""Random checkpoints of true dimensions, as Hugging Face lays them out.

    python make_models.py --out DIR llama-1.1b clip-l-336
    python make_models.py --out DIR --name mine llama --hidden 1024 --layers 8 --heads 16 --kv-heads 4 --intermediate 2752

Matrices are N(0, 0.02), norms' weights 1, in bf16. The speed of a program does not depend on the values; where outputs are compared,
they are compared with the same weights in f32. `--tokenizer FILE` copies a SentencePiece model beside a language model.
"""

import argparse
import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file

NAMED = {
    "llama-1.1b": dict(hidden=2048, layers=22, heads=32, kv_heads=4, intermediate=5632, vocab=32000),
    "clip-l-336": dict(hidden=1024, layers=24, heads=16, intermediate=4096, image=336, patch=14),
}


def matrix(*shape):
    return torch.empty(*shape, dtype=torch.float32).normal_(0, 0.02).to(torch.bfloat16)


def ones(n):
    return torch.ones(n, dtype=torch.bfloat16)


def write(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    total = sum(t.numel() for t in tensors.values())
    print(f"{folder}: {total / 1e6:.1f} M parameters")


def llama(folder, d, context=8192):
    hidden, head_dim = d["hidden"], d.get("head_dim") or d["hidden"] // d["heads"]
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", hidden_size=hidden,
                  intermediate_size=d["intermediate"], num_hidden_layers=d["layers"], num_attention_heads=d["heads"],
                  num_key_value_heads=d["kv_heads"], head_dim=head_dim, vocab_size=d["vocab"], max_position_embeddings=context,
                  rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
                  bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16")
    t = {"model.embed_tokens.weight": matrix(d["vocab"], hidden), "model.norm.weight": ones(hidden), "lm_head.weight": matrix(d["vocab"], hidden)}
    for i in range(d["layers"]):
        p = f"model.layers.{i}."
        t[p + "self_attn.q_proj.weight"] = matrix(d["heads"] * head_dim, hidden)
        t[p + "self_attn.k_proj.weight"] = matrix(d["kv_heads"] * head_dim, hidden)
        t[p + "self_attn.v_proj.weight"] = matrix(d["kv_heads"] * head_dim, hidden)
        t[p + "self_attn.o_proj.weight"] = matrix(hidden, d["heads"] * head_dim)
        t[p + "mlp.gate_proj.weight"] = matrix(d["intermediate"], hidden)
        t[p + "mlp.up_proj.weight"] = matrix(d["intermediate"], hidden)
        t[p + "mlp.down_proj.weight"] = matrix(hidden, d["intermediate"])
        t[p + "input_layernorm.weight"] = ones(hidden)
        t[p + "post_attention_layernorm.weight"] = ones(hidden)
    write(folder, config, t)


def clip(folder, d):
    hidden, side = d["hidden"], d["image"] // d["patch"]
    config = dict(architectures=["CLIPVisionModel"], model_type="clip_vision_model", hidden_act="quick_gelu", hidden_size=hidden,
                  intermediate_size=d["intermediate"], num_hidden_layers=d["layers"], num_attention_heads=d["heads"], image_size=d["image"],
                  patch_size=d["patch"], num_channels=3, layer_norm_eps=1e-5, projection_dim=768, torch_dtype="bfloat16")
    p = "vision_model."
    t = {p + "embeddings.class_embedding": matrix(hidden), p + "embeddings.patch_embedding.weight": matrix(hidden, 3, d["patch"], d["patch"]),
         p + "embeddings.position_embedding.weight": matrix(side * side + 1, hidden)}

    def norm(name):
        t[name + ".weight"], t[name + ".bias"] = ones(hidden), matrix(hidden)

    norm(p + "pre_layrnorm")
    norm(p + "post_layernorm")
    for i in range(d["layers"]):
        layer = f"{p}encoder.layers.{i}."
        for name, rows, columns in (("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", hidden, hidden), ("self_attn.v_proj", hidden, hidden),
                                    ("self_attn.out_proj", hidden, hidden), ("mlp.fc1", d["intermediate"], hidden),
                                    ("mlp.fc2", hidden, d["intermediate"])):
            t[layer + name + ".weight"], t[layer + name + ".bias"] = matrix(rows, columns), matrix(rows)
        norm(layer + "layer_norm1")
        norm(layer + "layer_norm2")
    write(folder, config, t)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=[*NAMED, "llama", "clip"])
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--name", help="folder of a checkpoint whose dimensions are given")
    parser.add_argument("--tokenizer", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=1)
    for name, default in (("hidden", 512), ("layers", 2), ("heads", 8), ("kv-heads", 8), ("head-dim", 0), ("intermediate", 1536), ("vocab", 32000),
                          ("image", 336), ("patch", 14)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    for what in args.what:
        torch.manual_seed(args.seed)
        folder = args.out / (args.name if what in ("llama", "clip") and args.name else what)
        (llama if what.startswith("llama") else clip)(folder, NAMED.get(what, vars(args)))
        if args.tokenizer and what.startswith("llama"):
            shutil.copy(args.tokenizer, folder / "tokenizer.model")


if __name__ == "__main__":
    main()

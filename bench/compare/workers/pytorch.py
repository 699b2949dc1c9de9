#!/usr/bin/env python3
"""PyTorch: FOLDER of a Hugging Face checkpoint, --format bf16|int8|int4-32|int4-128, compiled and frozen unless --eager.

LLaMA is written out here with what PyTorch offers for a CPU (oneDNN's linear layers, scaled_dot_product_attention, a static key-value cache),
so that torch.compile sees one graph. int8: torch_int8.py. int4: aten::_weight_int4pack_mm_for_cpu, activations in bf16.
"""

import argparse
import json
import pathlib
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from protocol import serve  # noqa: E402
from torch_int8 import Int8  # noqa: E402


class Int4(torch.nn.Module):
    def __init__(self, w, group):
        super().__init__()
        self.group = group
        g = w.float().view(len(w), -1, group)
        scale = g.abs().amax(-1) / 7
        q = ((g / scale[..., None]).round().clamp(-8, 7) + 8).to(torch.int32).view(w.shape)
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1))
        self.register_buffer("scales", torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous().to(torch.bfloat16))

    def forward(self, x):
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.view(-1, x.shape[-1]), self.packed, self.group, self.scales)


class Plain(torch.nn.Module):
    def __init__(self, w):
        super().__init__()
        self.weight = torch.nn.Parameter(w, requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight)


class Llama(torch.nn.Module):
    def __init__(self, folder, kind, rows, context):
        super().__init__()
        c = json.loads((folder / "config.json").read_text())
        t = load_file(folder / "model.safetensors")
        dtype = torch.float32 if kind == "f32" else torch.bfloat16

        def linear(*names):
            w = torch.cat([t.pop(n + ".weight") for n in names])
            if kind == "int8":
                return Int8(w, rows)
            return Int4(w, int(kind[5:])) if kind.startswith("int4") else Plain(w.to(dtype))

        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        self.dim = c.get("head_dim") or c["hidden_size"] // self.heads
        self.eps, self.hidden, self.intermediate = c["rms_norm_eps"], c["hidden_size"], c["intermediate_size"]
        self.register_buffer("embedding", t["model.embed_tokens.weight"].to(dtype))
        self.layers = torch.nn.ModuleList()
        for i in range(c["num_hidden_layers"]):
            p = f"model.layers.{i}."
            layer = torch.nn.Module()
            layer.qkv = linear(p + "self_attn.q_proj", p + "self_attn.k_proj", p + "self_attn.v_proj")
            layer.out = linear(p + "self_attn.o_proj")
            layer.gate_up, layer.down = linear(p + "mlp.gate_proj", p + "mlp.up_proj"), linear(p + "mlp.down_proj")
            layer.register_buffer("norm1", t[p + "input_layernorm.weight"].to(dtype))
            layer.register_buffer("norm2", t[p + "post_attention_layernorm.weight"].to(dtype))
            self.layers.append(layer)
        self.register_buffer("norm", t["model.norm.weight"].to(dtype))
        self.head = linear("lm_head")
        angle = torch.outer(torch.arange(context).float(), c.get("rope_theta", 10000.0) ** (-torch.arange(0, self.dim, 2).float() / self.dim))
        self.register_buffer("cos", torch.cat([angle.cos()] * 2, 1).to(dtype))
        self.register_buffer("sin", torch.cat([angle.sin()] * 2, 1).to(dtype))

    def rotate(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def forward(self, ids, keys, values, position, mask):
        """ids [n]; keys, values [layers][1, kv_heads, context, dim]; position [n]; mask None for a prompt from nothing, else [1, 1, 1, context]."""
        n = ids.shape[0]
        cos, sin = self.cos[position], self.sin[position]
        x = self.embedding[ids]
        for layer, k_all, v_all in zip(self.layers, keys, values):
            qkv = layer.qkv(F.rms_norm(x, (self.hidden,), layer.norm1, self.eps)).view(n, -1, self.dim).transpose(0, 1).unsqueeze(0)
            q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
            q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
            k_all.index_copy_(2, position, k)
            v_all.index_copy_(2, position, v)
            if mask is None:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            else:
                y = F.scaled_dot_product_attention(q, k_all, v_all, attn_mask=mask, enable_gqa=True)
            x = x + layer.out(y.squeeze(0).transpose(0, 1).reshape(n, -1))
            gate, up = layer.gate_up(F.rms_norm(x, (self.hidden,), layer.norm2, self.eps)).split(self.intermediate, -1)
            x = x + layer.down(F.silu(gate) * up)
        return self.head(F.rms_norm(x[-1:], (self.hidden,), self.norm, self.eps))


class State:
    def __init__(self, args):
        torch.set_num_threads(args.threads)
        import torch._inductor.config as inductor
        inductor.freezing = True
        self.context, self.folder, self.args = args.context, args.folder, args
        self.models = {}

    def model(self, rows):
        # int8 and 4 bits keep their weights in another form for one row than for many.
        key = min(rows, 2) if self.args.format == "int8" else 0
        if key not in self.models:
            m = Llama(self.folder, self.args.format, rows, self.context).eval()
            dtype = torch.float32 if self.args.format == "f32" else torch.bfloat16
            kv = [[torch.zeros(1, m.kv_heads, self.context, m.dim, dtype=dtype) for _ in m.layers] for _ in range(2)]
            self.models[key] = (m if self.args.eager else torch.compile(m), kv)
        return self.models[key]


def run(model, kv, ids, position, mask):
    with torch.no_grad():
        return model(ids, kv[0], kv[1], position, mask)


def prefill(s, request):
    ids = torch.tensor(request["ids"])
    model, kv = s.model(len(ids))
    start = time.perf_counter()
    logits = run(model, kv, ids, torch.arange(len(ids)), None)
    seconds = time.perf_counter() - start
    if "logits" in request:
        np.save(request["logits"], logits[0].float().numpy())
    return seconds


def decode(s, request):
    ids, n = request["ids"], request["n"]
    model, kv = s.model(1)
    mask = torch.zeros(1, 1, 1, s.context, dtype=kv[0][0].dtype)
    mask[..., len(ids):] = -float("inf")
    start = time.perf_counter()
    for step in range(n):
        at = len(ids) + step
        mask[..., at] = 0
        run(model, kv, torch.tensor([1 + step]), torch.tensor([at]), mask).argmax(-1)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--format", default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args()
    serve(lambda: State(args), {"prefill": prefill, "decode": decode})


if __name__ == "__main__":
    main()

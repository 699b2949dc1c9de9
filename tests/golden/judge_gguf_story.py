#!/usr/bin/env python3
"""Judges the greedy text of llama/stories15M-Q4_0.gguf: transformers in f32 on the dequantised weights, and with llama.cpp's rounding.

    python judge_gguf_story.py [--assets ../../../shared/assets] [--out gguf/story.json]

llama.cpp rounds what enters a product with quantised weights to 8 bits in blocks of 32 (Q8_0). The script follows llama.cpp's recorded
text token by token, exactly and with that rounding, and records where the best token is another one and by how much.
"""
import argparse
import json
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)


def load(path):
    reader = gguf.GGUFReader(path)

    def value(key):
        return reader.fields[key].contents()

    heads = value("llama.attention.head_count")
    config = LlamaConfig(vocab_size=32000, hidden_size=value("llama.embedding_length"), intermediate_size=value("llama.feed_forward_length"),
                         num_hidden_layers=value("llama.block_count"), num_attention_heads=heads, num_key_value_heads=value("llama.attention.head_count_kv"),
                         max_position_embeddings=value("llama.context_length"), rms_norm_eps=1e-5, tie_word_embeddings=False)
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
             "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    state = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if parts[2] in ("attn_q", "attn_k"):
                values = values.reshape(heads, values.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
            name = f"model.layers.{parts[1]}.{names[parts[2]]}.weight"
        else:
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}[parts[0]] + ".weight"
        state[name] = torch.from_numpy(np.array(values, np.float32))
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def q8_0(x):
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    quants = torch.where(scale > 0, torch.round(blocks / torch.where(scale > 0, scale, 1)), torch.zeros_like(blocks))
    return (quants * scale.half().float()).reshape(x.shape)


def follow(model, ids, begin):
    """The best token at each place behind `begin`, with the lead over the token that was recorded there."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    best = [int(logits[t - 1].argmax()) for t in range(begin, len(ids))]
    leads = {t: float(logits[t - 1, b] - logits[t - 1, ids[t]]) for t, b in enumerate(best, begin) if b != ids[t]}
    return best, leads


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=HERE / "../../../shared/assets")
    parser.add_argument("--out", type=Path, default=HERE / "gguf" / "story.json")
    arguments = parser.parse_args()
    text = sentencepiece.SentencePieceProcessor(str(arguments.assets / "llama" / "tokenizer.model"))
    model = load(arguments.assets / "llama" / "stories15M-Q4_0.gguf")
    recorded = (arguments.assets / "golden" / "llama.cpp" / "stories15M_greedy.txt").read_text()
    recorded = recorded.split("== stories15M-Q4_0\n")[1].split("\n\n==")[0].strip()
    ids = [1] + text.encode(recorded)
    assert text.decode(ids[1:]) == recorded
    begin = 1 + len(text.encode("Once upon a time"))
    best, leads = follow(model, ids, begin)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (q8_0(inputs[0]),))
    _, rounded_leads = follow(model, ids, begin)
    for what, found in (("f32", leads), ("8-bit activations", rounded_leads)):
        print(f"{what}: {len(ids) - begin - len(found)} of {len(ids) - begin} tokens are llama.cpp's;",
              ", ".join(f"token {t} ({text.id_to_piece(ids[t])}): {text.id_to_piece(best[t - begin])} leads by {lead:.4f}" for t, lead in found.items()))
    arguments.out.write_text(json.dumps({"ids": ids, "prompt": begin, "best": best, "leads": {str(t): round(lead, 6) for t, lead in leads.items()},
                                         "leads_with_rounded_activations": {str(t): round(lead, 6) for t, lead in rounded_leads.items()}}) + "\n")


if __name__ == "__main__":
    main()

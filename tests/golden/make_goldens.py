#!/usr/bin/env python3
"""Makes the small reference files of tests/golden with PyTorch, transformers and Pillow.

    python make_goldens.py --out DIR [--assets DIR] [--only llama,clip,llava,tokenizer,images,templates]

Everything is seeded and runs on one thread: two runs write the same bytes. README.md says what is in each file.
"""
import argparse
import io
import json
import os
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (AutoTokenizer, CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel,
                          CLIPVisionModelWithProjection, LlamaConfig, LlamaForCausalLM, LlavaConfig,
                          LlavaForConditionalGeneration, MistralConfig, MistralForCausalLM)

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
MIN_GAP = 2e-3  # least distance, relative to max|logits|, between the first and second choice of a greedy step


# ------------------------------------------------------------------------------------------------- helpers
def write_json(path, value, **kw):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=True, **kw) + "\n")


def save(path, tensors):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({k: torch.as_tensor(tensors[k]).contiguous().clone() for k in sorted(tensors)}, str(path))
    Path(path).chmod(0o644)


def randomize(model, seed):
    """Own seeded values for every parameter: not flat, norms not 1, biases not 0, independent of the library's init."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            r = torch.randn(p.shape, generator=gen)
            if p.dim() == 4:
                r = r * 1.5 / (p[0].numel() ** 0.5)
            elif p.dim() == 2 and ("embed" in name or "position" in name):
                r = r * 0.8
            elif p.dim() == 2:
                r = r * 1.6 / (p.shape[1] ** 0.5)
            elif "norm" in name and name.endswith("weight"):
                r = 1.0 + 0.25 * r
            else:
                r = 0.2 * r
            p.copy_(r)
    return model.float().eval()


def causal_golden(model, ids, **kw):
    with torch.no_grad():
        o = model(input_ids=ids[None], output_hidden_states=True, use_cache=False, **kw)
    t = {"input_ids": ids.int(), "logits": o.logits[0]}
    for i, h in enumerate(o.hidden_states):
        t[f"hidden_states.{i}"] = h[0]
    return t


def greedy(model, ids, n, **kw):
    """n greedy tokens, each from a full forward pass without a cache and without a stop. Also the least gap seen."""
    cur, gap = ids.clone(), 1e9
    for _ in range(n):
        with torch.no_grad():
            l = model(input_ids=cur[None], use_cache=False, **kw).logits[0, -1]
        top = torch.topk(l, 2)
        gap = min(gap, float((top.values[0] - top.values[1]) / l.abs().max()))
        cur = torch.cat([cur, top.indices[:1]])
    return cur[len(ids):].int(), gap


def to_old_dialect(cfg):
    """The config.json of transformers < 4.56: rope_theta, rope_scaling, torch_dtype; keys with default values absent."""
    def text(t):
        rp = t.pop("rope_parameters")
        kind = rp.pop("rope_type")
        theta = rp.pop("rope_theta")
        if theta != 10000.0:
            t["rope_theta"] = theta
        if kind == "linear":
            t["rope_scaling"] = {"type": "linear", **rp}          # the oldest spelling: "type"
        elif kind == "llama3":
            t["rope_scaling"] = {"rope_type": "llama3", **rp}
        else:
            t["rope_scaling"] = None
        if "dtype" in t:
            t["torch_dtype"] = t.pop("dtype")
        for k in ("attention_bias", "attention_dropout", "mlp_bias", "pretraining_tp", "initializer_range"):
            t.pop(k, None)
        if t.get("hidden_act") == "silu":
            t.pop("hidden_act")                                   # default
        if t.get("head_dim") == t["hidden_size"] // t["num_attention_heads"]:
            t.pop("head_dim")                                     # default
        if t.get("num_key_value_heads") == t["num_attention_heads"] and t["model_type"] == "llama":
            t.pop("num_key_value_heads")                          # default (Mistral's default is 8, not this)
        if t.get("pad_token_id") is None:
            t.pop("pad_token_id", None)
        return t

    cfg = json.loads(json.dumps(cfg))
    if "text_config" in cfg:
        cfg["text_config"] = text(cfg["text_config"])
        cfg["text_config"].pop("torch_dtype", None)
        v = cfg["vision_config"]
        for k in ("attention_dropout", "dtype", "initializer_factor", "initializer_range", "num_channels", "architectures"):
            v.pop(k, None)
        if v.get("hidden_act") == "quick_gelu":
            v.pop("hidden_act")
        if v.get("layer_norm_eps") == 1e-5:
            v.pop("layer_norm_eps")
        for k in ("multimodal_projector_bias", "image_seq_length"):
            cfg.pop(k, None)
        cfg["ignore_index"] = -100
        cfg["torch_dtype"] = cfg.pop("dtype")
    else:
        cfg = text(cfg)
    cfg["transformers_version"] = "4.37.2"
    return cfg


def read_config(d):
    return json.loads((d / "config.json").read_text())


# ------------------------------------------------------------------------------------------------- A: decoders
def make_llama(out):
    base = dict(vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=4, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False,
                bos_token_id=1, eos_token_id=2, pad_token_id=0)
    rope = lambda kind="default", theta=10000.0, **kw: dict(rope_type=kind, rope_theta=theta, **kw)
    llama3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
    L, M = (LlamaConfig, LlamaForCausalLM), (MistralConfig, MistralForCausalLM)
    # name -> (classes, config, dialect, dtype on disk, shards, seed)
    table = {
        "mha_plain": (L, dict(num_hidden_layers=3, rope_parameters=rope()), "new", "f32", False, 11),
        "gqa_linear_tied_sharded": (L, dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=2, head_dim=6,
                                            tie_word_embeddings=True, rope_parameters=rope("linear", factor=2.0)),
                                    "old", "f32", True, 12),
        "mqa_llama3_hd10": (L, dict(hidden_size=40, num_key_value_heads=1, head_dim=10,
                                    rope_parameters=rope("llama3", 500.0, **llama3)), "new", "f32", False, 13),
        "gqa_llama3_tied_f16": (L, dict(num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-6,
                                        rope_parameters=rope("llama3", 1000.0, **llama3)), "old", "f16", False, 14),
        "mha_wide_heads_bf16": (L, dict(hidden_size=36, num_attention_heads=3, num_key_value_heads=3, head_dim=18,
                                        rope_parameters=rope(theta=500000.0)), "old", "bf16", False, 15),
        "mqa_linear_tied_hd6": (L, dict(hidden_size=40, num_attention_heads=5, num_key_value_heads=1, head_dim=6,
                                        tie_word_embeddings=True, rope_parameters=rope("linear", factor=4.0)),
                                "new", "f32", False, 16),
        "mistral_window": (M, dict(hidden_size=48, num_hidden_layers=3, num_key_value_heads=2, head_dim=8, sliding_window=5,
                                   rope_parameters=rope()), "new", "f32", False, 17),
        "mistral_nowindow": (M, dict(num_key_value_heads=2, head_dim=8, sliding_window=None,
                                     rope_parameters=rope(theta=1e6)), "old", "f32", False, 18),
    }
    report = {}
    for name, ((Config, Model), over, dialect, dtype, sharded, seed) in table.items():
        d = out / "llama" / name
        config = Config(**{**base, **over})
        config._attn_implementation = "eager"
        ids = torch.randint(3, 96, (19 + seed % 4,), generator=torch.Generator().manual_seed(seed))
        ids[0] = 1
        for s in range(seed, seed + 2000, 100):  # the first seed with clear greedy choices
            model = randomize(Model(config), s)
            disk = model.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype])
            shutil.rmtree(d, ignore_errors=True)
            d.mkdir(parents=True)
            disk.save_pretrained(d, max_shard_size="40KB" if sharded else "1GB")
            if dialect == "old":
                write_json(d / "config.json", to_old_dialect(read_config(d)))
            model, info = Model.from_pretrained(d, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"], info
            model.eval()
            rp = {k: v for k, v in model.config.rope_parameters.items() if k != "type"}
            assert rp == over["rope_parameters"], (name, rp)
            g, gap = greedy(model, ids, 12)
            if gap > MIN_GAP:
                break
        assert gap > MIN_GAP, (name, gap)
        t = causal_golden(model, ids)
        t["greedy"] = g
        if name == "mha_plain":
            bf = Model.from_pretrained(d, dtype=torch.bfloat16, attn_implementation="eager").eval()
            with torch.no_grad():
                t["logits_bf16"] = bf(input_ids=ids[None], use_cache=False).logits[0].float()
        if over.get("sliding_window"):  # the window must matter
            model.config.sliding_window = None
            assert not torch.allclose(causal_golden(Model.from_pretrained(d, config=model.config,
                                      attn_implementation="eager").eval(), ids)["logits"], t["logits"], atol=1e-2)
        save(d / "golden.safetensors", t)
        report[name] = dict(seed=s, gap=round(gap, 4), files=sorted(p.name for p in d.iterdir()))
    return report


# ------------------------------------------------------------------------------------------------- B: CLIP
def make_clip(out):
    table = {
        # name -> (class, vision config, batch)
        "patch14_proj": (CLIPVisionModelWithProjection, dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                         num_attention_heads=4, image_size=42, patch_size=14, projection_dim=20), 2),
        "patch16_hd6_remainder": (CLIPVisionModel, dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3,
                                  num_attention_heads=4, image_size=50, patch_size=16), 2),
        "patch32_full_clip_hd5": (CLIPModel, dict(hidden_size=10, intermediate_size=28, num_hidden_layers=2,
                              num_attention_heads=2, image_size=64, patch_size=32, projection_dim=12, hidden_act="gelu"), 1),
    }
    report = {}
    for n, (name, (Model, vc, batch)) in enumerate(table.items()):
        d = out / "clip" / name
        shutil.rmtree(d, ignore_errors=True)
        d.mkdir(parents=True)
        if Model is CLIPModel:
            config = CLIPConfig(text_config=dict(vocab_size=24, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                                 num_attention_heads=2, max_position_embeddings=6, bos_token_id=1, eos_token_id=2,
                                                 projection_dim=vc["projection_dim"]),
                                vision_config=vc, projection_dim=vc["projection_dim"])
        else:
            config = CLIPVisionConfig(**vc)
        config._attn_implementation = "eager"
        model = randomize(Model(config), 100 + n)
        model.save_pretrained(d)
        model = Model.from_pretrained(d, attn_implementation="eager").eval()
        px = torch.randn(batch, 3, vc["image_size"], vc["image_size"], generator=torch.Generator().manual_seed(200 + n))
        t = {"pixel_values": px}
        with torch.no_grad():
            vision = model.vision_model if hasattr(model, "vision_model") else model
            o = vision(px, output_hidden_states=True)
            t["last_hidden_state"], t["pooler_output"] = o.last_hidden_state, o.pooler_output
            for i, h in enumerate(o.hidden_states):
                t[f"hidden_states.{i}"] = h
            assert torch.equal(o.hidden_states[-1], o.last_hidden_state)
            if hasattr(model, "visual_projection"):
                t["image_embeds"] = model.visual_projection(o.pooler_output)
                t["projected"] = model.visual_projection(o.last_hidden_state)
                if Model is CLIPVisionModelWithProjection:
                    assert torch.equal(model(px).image_embeds, t["image_embeds"])
        save(d / "golden.safetensors", t)
        report[name] = dict(keys=sorted(load_file(d / "model.safetensors"))[:2])
    return report


# ------------------------------------------------------------------------------------------------- C: LLaVA
def llava_keys(state, layout):
    """state_dict names (model.language_model.…, model.vision_tower.…, lm_head.weight) -> names on disk."""
    def one(k):
        if layout == "old":
            k = k.replace("model.language_model.", "language_model.model.", 1) if k.startswith("model.language_model.") else k
            k = "language_model." + k if k.startswith("lm_head") else k
            k = k[len("model."):] if k.startswith(("model.vision_tower.", "model.multi_modal_projector.")) else k
        return k.replace("vision_tower.", "vision_tower.vision_model.", 1) if "vision_tower." in k else k
    return {one(k): v.contiguous().clone() for k, v in state.items()}


def llava_prompt(seed, vocab, image_id, per_image, where):
    """Random text ids with runs of image_id before the given text positions."""
    gen = torch.Generator().manual_seed(seed)
    text = torch.randint(3, image_id, (14,), generator=gen).tolist()
    text[0] = 1
    ids = []
    for i, x in enumerate(text):
        ids += [image_id] * (per_image * where.count(i)) + [x]
    ids += [image_id] * (per_image * where.count(len(text)))
    return torch.tensor(ids)


def llava_golden(model, ids, px, n_greedy=10):
    cfg = model.config
    t = causal_golden(model, ids, pixel_values=px)
    t["pixel_values"] = px
    with torch.no_grad():
        vt = model.model.vision_tower(px, output_hidden_states=True)
        sel = vt.hidden_states[cfg.vision_feature_layer]
        used = sel[:, 1:] if cfg.vision_feature_select_strategy == "default" else sel
        t["vision_hidden"] = sel                                    # [n, tokens with CLS, d]
        t["features"] = model.model.multi_modal_projector(used)     # [n, tokens, hidden]
    emb = t["hidden_states.0"][ids == cfg.image_token_id]
    assert torch.equal(emb, t["features"].reshape(emb.shape))
    t["greedy"], gap = greedy(model, ids, n_greedy, pixel_values=px)
    return t, gap


def make_llava(out):
    vbase = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=28,
                 patch_size=14, projection_dim=24)
    tbase = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False,
                 bos_token_id=1, eos_token_id=2, pad_token_id=None)
    rope = dict(rope_type="default", rope_theta=10000.0)
    table = {
        # name -> (text config, layer, strategy, key layout, dialect, seed)
        "old_keys_m2_default": (LlamaConfig(**{**tbase, "num_key_value_heads": 4}, rope_parameters=rope), -2, "default", "old", "old", 31),
        "new_keys_m1_full": (LlamaConfig(**{**tbase, "hidden_size": 40, "head_dim": 10}, rope_parameters=dict(
            rope_type="linear", rope_theta=10000.0, factor=2.0)), -1, "full", "new", "new", 32),
        "saved_keys_mistral_p1_default": (MistralConfig(**{**tbase, "tie_word_embeddings": True}, head_dim=8, sliding_window=6,
                                          rope_parameters=rope), 1, "default", "saved", "new", 33),
    }
    image_id = 90
    cases = {"1img": [4], "2img": [5, 5], "3img": [1, 7, 14]}
    report = {}
    for name, (tc, layer, strategy, layout, dialect, seed) in table.items():
        d = out / "llava" / name
        config = LlavaConfig(vision_config=CLIPVisionConfig(**vbase), text_config=tc, image_token_index=image_id,
                             vision_feature_layer=layer, vision_feature_select_strategy=strategy, projector_hidden_act="gelu",
                             image_seq_length=5 if strategy == "full" else 4, tie_word_embeddings=tc.tie_word_embeddings)
        config._attn_implementation = "eager"
        for s in range(seed, seed + 5000, 100):
            shutil.rmtree(d, ignore_errors=True)
            d.mkdir(parents=True)
            model = randomize(LlavaForConditionalGeneration(config), s)
            model.save_pretrained(d)
            if layout != "saved":
                state = model.state_dict()
                save_file(llava_keys(state, layout), str(d / "model.safetensors"), metadata={"format": "pt"})
            if dialect == "old":
                write_json(d / "config.json", to_old_dialect(read_config(d)))
            loaded, info = LlavaForConditionalGeneration.from_pretrained(d, attn_implementation="eager", output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"], info
            loaded.eval()
            for (a, x), (b, y) in zip(sorted(model.named_parameters()), sorted(loaded.named_parameters())):
                assert a == b and torch.equal(x, y), (name, a)
            goldens, gaps = {}, []
            for case, where in cases.items():
                n = len(where)
                ids = llava_prompt(seed + n, 96, image_id, 5 if strategy == "full" else 4, where)
                px = torch.randn(n, 3, 28, 28, generator=torch.Generator().manual_seed(seed * 10 + n))
                goldens[case], gap = llava_golden(loaded, ids, px)
                gaps.append(gap)
                ok = image_id not in goldens[case]["greedy"].tolist()
                if gap < MIN_GAP or not ok:
                    gaps.append(0)
                    break
            if min(gaps) > MIN_GAP:
                break
        assert min(gaps) > MIN_GAP, (name, gaps)
        for case, t in goldens.items():
            save(d / f"golden_{case}.safetensors", t)
        report[name] = dict(seed=s, gap=round(min(gaps), 4), keys=sorted(load_file(d / "model.safetensors")))
    report["with_tokenizer"] = make_llava_with_tokenizer(out)
    return report


CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
    "answers to the user's questions. USER: What is shown in this image? ASSISTANT: A red circle and a blue square.",
    "USER: What colour is the shape? ASSISTANT: It is a teal triangle.", "Is there a large circle? yes no", "What shape is in the picture?",
    "There are two shapes in the image: a small green rectangle and a big yellow circle.", "Describe the picture in a few words.",
    "caf\u00e9 na\u00efve \u00fcber \u00e9t\u00e9", "[INST] How many squares are there? [/INST] There are 12 squares, 3 circles and 0 triangles.",
    "0 1 2 3 4 5 6 7 8 9 10 23 456 7890", "the the the cat sat on the mat   with   spaces", "def f(x):\n    return x + 1\n\n        y = 2\n",
    "the image shows a brown dog; the dog is on the grass. it's not a cat!", "ASSISTANT USER ASSISTANT USER image picture shape colour",
]
HUB_TEMPLATE = (  # the rendering rules of llava-hf/llava-1.5-7b-hf, in our own words
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] | upper }}: {% endif %}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")


def train_sentencepiece(path, vocab_size=340):
    import sentencepiece as spm
    with tempfile.TemporaryDirectory() as tmp:
        Path(tmp, "corpus.txt").write_text("\n".join(x.replace("\n", " ") for x in CORPUS) + "\n")
        cwd = os.getcwd()
        os.chdir(tmp)  # relative names: no machine path lands in the model
        try:
            spm.SentencePieceTrainer.train(
                input="corpus.txt", model_prefix="tok", vocab_size=vocab_size, model_type="bpe", byte_fallback=True,
                normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True, split_digits=True,
                allow_whitespace_only_pieces=True, character_coverage=0.995, num_threads=1, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
                minloglevel=2)
        finally:
            os.chdir(cwd)
        shutil.copyfile(Path(tmp, "tok.model"), path)


def special(content):
    return dict(content=content, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)


def fast_tokenizer(model_file, added, style):
    """A `tokenizers` object with merges in the order of the sentencepiece scores, as transformers 4 and the files on the
    hub have them. "prepend": the tokenizer.json of llava-hf/llava-1.5-7b-hf (a normalizer, no pre-tokenizer).
    "first": what transformers 4 made of a tokenizer.model with legacy=False (Metaspace, prepend_scheme first)."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE
    sp = SentencePieceProcessor(model_file=str(model_file))
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    vocab = {p: i for i, p in enumerate(pieces)}
    merges = []
    for i, p in enumerate(pieces):
        for cut in range(1, len(p)):
            if p[:cut] in vocab and p[cut:] in vocab:
                merges.append((-sp.get_score(i), -cut, i, (p[:cut], p[cut:])))  # best score, then longer left part, first
    merges = [m[3] for m in sorted(merges)]
    tok = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if style == "prepend":
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    tok.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    tok.add_special_tokens([AddedToken(x, normalized=False, special=True) for x in ["<unk>", "<s>", "</s>"] + added])
    return tok


def tokenizer_config(n, legacy, cls="LlamaTokenizer"):
    return dict(add_bos_token=True, add_eos_token=False,
                added_tokens_decoder={str(i): special(x) for i, x in
                                      [(0, "<unk>"), (1, "<s>"), (2, "</s>"), (n, "<image>"), (n + 1, "<pad>")]},
                bos_token="<s>", clean_up_tokenization_spaces=False, eos_token="</s>", legacy=legacy,
                model_max_length=1000000000000000019884624838656, pad_token="<pad>", padding_side="left",
                processor_class="LlavaProcessor", tokenizer_class=cls, unk_token="<unk>", use_default_system_prompt=False)


CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def preprocessor_config(size, crop):
    return dict(crop_size=dict(height=crop, width=crop), do_center_crop=True, do_convert_rgb=True, do_normalize=True,
                do_rescale=True, do_resize=True, image_mean=CLIP_MEAN, image_processor_type="CLIPImageProcessor",
                image_std=CLIP_STD, resample=3, rescale_factor=0.00392156862745098, size=dict(shortest_edge=size))


def make_llava_with_tokenizer(out):
    from transformers import AutoProcessor
    d = out / "llava" / "with_tokenizer"
    shutil.rmtree(d, ignore_errors=True)
    d.mkdir(parents=True)
    train_sentencepiece(d / "tokenizer.model")
    n = 340
    write_json(d / "added_tokens.json", {"<image>": n, "<pad>": n + 1})
    write_json(d / "tokenizer_config.json", tokenizer_config(n, False))
    write_json(d / "special_tokens_map.json", dict(bos_token=special("<s>"), eos_token=special("</s>"), pad_token=special("<pad>"),
                                                   unk_token=special("<unk>")))
    (d / "tokenizer.json").write_text(json.dumps(json.loads(fast_tokenizer(d / "tokenizer.model", ["<image>", "<pad>"], "prepend").to_str()),
                                                 ensure_ascii=True, separators=(",", ":")) + "\n")
    write_json(d / "preprocessor_config.json", preprocessor_config(28, 28))
    write_json(d / "processor_config.json", dict(image_token="<image>", num_additional_image_tokens=1, patch_size=14,
                                                 processor_class="LlavaProcessor", vision_feature_select_strategy="default"))
    write_json(d / "chat_template.json", dict(chat_template=HUB_TEMPLATE))
    noise_image(47, 61, 5).save(d / "picture.png", optimize=False, compress_level=9)

    tc = LlamaConfig(vocab_size=352, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=False,
                     bos_token_id=1, eos_token_id=2, pad_token_id=None, rope_parameters=dict(rope_type="default", rope_theta=10000.0))
    vc = CLIPVisionConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=28,
                          patch_size=14, projection_dim=24)
    config = LlavaConfig(vision_config=vc, text_config=tc, image_token_index=n, vision_feature_layer=-2,
                         vision_feature_select_strategy="default", projector_hidden_act="gelu", image_seq_length=4, pad_token_id=n + 1)
    config._attn_implementation = "eager"
    question = "What is shown in this image?"
    for s in range(41, 20000, 100):
        model = randomize(LlavaForConditionalGeneration(config), s)
        model.save_pretrained(d)
        write_json(d / "generation_config.json", dict(_from_model_config=True, bos_token_id=1, eos_token_id=2, pad_token_id=n + 1,
                                                      transformers_version="4.37.2"))
        cfg = to_old_dialect(read_config(d))
        write_json(d / "config.json", cfg)
        save_file(llava_keys(model.state_dict(), "old"), str(d / "model.safetensors"), metadata={"format": "pt"})
        model = LlavaForConditionalGeneration.from_pretrained(d, attn_implementation="eager").eval()
        proc = AutoProcessor.from_pretrained(d)
        image = Image.open(d / "picture.png")
        rendered = proc.apply_chat_template([dict(role="user", content=[dict(type="image"), dict(type="text", text=question)])],
                                            add_generation_prompt=True)
        assert rendered == f"USER: <image>\n{question} ASSISTANT:", rendered
        batch = proc(images=image, text=rendered, return_tensors="pt")
        ids = batch["input_ids"][0]
        t, gap = llava_golden(model, ids, batch["pixel_values"].float(), 16)
        g = t["greedy"].tolist()
        if gap > MIN_GAP and max(g) < n and 2 not in g:
            break
    else:
        raise SystemExit("no seed with clear greedy choices")
    save(d / "golden.safetensors", t)
    styles = {k: tok(rendered)["input_ids"] for k, tok in tokenizer_styles(d / "tokenizer.model", n).items()}
    write_json(d / "golden.json", dict(
        question=question, rendered=rendered, image="picture.png", ids_before_expansion=proc.tokenizer(rendered)["input_ids"],
        input_ids=ids.tolist(), greedy_ids=g, greedy_text=proc.tokenizer.decode(g, skip_special_tokens=True),
        ids_before_expansion_by_style=styles, image_processor=type(proc.image_processor).__name__,
        tokenizer_class=type(proc.tokenizer).__name__))
    return dict(seed=s, gap=round(gap, 4), processor=[type(proc.image_processor).__name__, type(proc.tokenizer).__name__])


# ------------------------------------------------------------------------------------------------- D: tokenizer
def tokenizer_styles(model_file, n):
    """The behaviours found with transformers for one sentencepiece file (README.md, 'Tokenizer')."""
    styles = {}
    for style, legacy, model_type, with_json in (("prepend", False, "llava", "prepend"), ("first", False, "llava", "first"),
                                                 ("first_v5", False, "llama", None), ("always_v5", True, "llama", None),
                                                 ("none_v5", False, "llava", None)):
        with tempfile.TemporaryDirectory() as tmp:
            shutil.copyfile(model_file, Path(tmp, "tokenizer.model"))
            write_json(Path(tmp, "tokenizer_config.json"), tokenizer_config(n, legacy))
            write_json(Path(tmp, "added_tokens.json"), {"<image>": n, "<pad>": n + 1})
            write_json(Path(tmp, "config.json"), dict(model_type=model_type))
            if with_json:
                fast_tokenizer(model_file, ["<image>", "<pad>"], with_json).save(str(Path(tmp, "tokenizer.json")))
            styles[style] = AutoTokenizer.from_pretrained(tmp)
    return styles


STRINGS = [
    "", "a", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "hi", " hi", "  hi", "   hi", "hi ", "hi  ", " hi ", "\nhi", "hi\n", "\n hi", " \nhi",
    "Hello", "Hello world", "Hello  world", "Hello   world", "Hello, world!", "hello\tworld", "hello\n\nworld", "a b c d", "a  b   c    d     e",
    " " * 4, " " * 8, " " * 15, " " * 16, " " * 17, " " * 33, "x" + " " * 20 + "y", "\t\t\tindented", "    return x", "\n\n\n\n", "line\r\nline",
    "What is shown in this image?", "Is there a circle?", "What colour is the shape?", "A teal circle.", "it's the user's question",
    "Answer the question using a single word or phrase.", "The quick brown fox jumps over the lazy dog.", "antidisestablishmentarianism",
    "0", "42", "2024-12-31", "3.14159", "1,000,000", "1234567890", "x=1;y=2", "a+b*(c-d)/e", "http://example.com/a?b=c&d=e#f", "foo_bar-baz.qux",
    "!@#$%^&*()", "<>", "<image", "image>", "< image >", "<Image>", "<s", "</s", "<pad", "[INST]", "[/INST]", "<<SYS>>", "{\"k\": [1, 2]}",
    "caf\u00e9", "cafe\u0301", "na\u00efve \u00fcber \u00df", "\u00c5ngstr\u00f6m", "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0442\u0435\u043a\u0441\u0442",
    "\u4f60\u597d\uff0c\u4e16\u754c", "\u3053\u3093\u306b\u3061\u306f", "\ud55c\uad6d\uc5b4", "\u0645\u0631\u062d\u0628\u0627", "\u05e9\u05dc\u05d5\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\U0001f600", "\U0001f600\U0001f600", "a\U0001f600b", "hi \U0001f44b\U0001f3fd there",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\u2603 \u2764\ufe0f", "\u00a0", "a\u00a0b", "\u200b", "a\u200bb", "\ufeffhi", "\u3000hi\u3000",
    "\ufb01nd", "\u212b", "\uff21\uff22\uff23", "\u2581", "\u2581hi", "hi\u2581there", " \u2581hi", "a\u0000b", "\u0001\u0002", "\u007f", "\U0010ffff", "\u0378",
    "<image>", "<pad>", "<s>", "</s>", "<unk>", "<image><image>", "<image> <image>", "<image>\n<image>", "<image>\n", "\n<image>", " <image>", "<image> ",
    " <image> ", "hi<image>", "<image>hi", "<image> hi", "hi <image>", "hi<image>there", "hi <image> there", "hi  <image>  there", "a<image><image>b",
    "<image>a<image>b<image>", "<image><pad>", "<pad><pad>hi", "<s>hi", "<s> hi", "hi</s>", "hi </s>", "</s>hi", "</s> hi", "a</s>b</s>c", "<s><s>", "<unk>hi",
    "<image>\nWhat is shown in this image?", "USER: <image>\nWhat is shown in this image? ASSISTANT:", "USER: <image>\nWhat's the content of the image?\nASSISTANT:",
    "USER: <image>\nIs it red? ASSISTANT: yes USER: And blue? ASSISTANT:", "USER: <image>\n<image>\nWhich is larger? ASSISTANT:",
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's "
    "questions. USER: <image>\nWhat is this? ASSISTANT:",
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's "
    "questions. USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:",
    "[INST] <image>\nWhat is this? [/INST]", "[INST] <image>\nWhat is this? [/INST]A cat.</s>[INST] Sure? [/INST]", "<s>[INST] Hi [/INST]Hello</s>[INST] Bye [/INST]",
    "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat is this? [/INST]", "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Bye [/INST]",
    "<image>\nDescribe the picture.\n",
]
SMALL = [s for i, s in enumerate(STRINGS) if i in range(0, 24) or "<image>" in s or s in (
    "Hello, world!", "caf\u00e9", "\U0001f600", "a\U0001f600b", "\u4f60\u597d\uff0c\u4e16\u754c", "1234567890", "<s>hi", "hi </s>", "</s> hi", "\u2581hi", "a\u0000b",
    "x" + " " * 20 + "y", "What is shown in this image?", "    return x", "<pad><pad>hi", "<unk>hi", "[INST]")]


def tokenizer_cases(model_file, n, strings):
    import sentencepiece as spm
    styles = tokenizer_styles(model_file, n)
    sp = spm.SentencePieceProcessor(model_file=str(model_file))
    cases = []
    for s in strings:
        c = dict(text=s, ids={k: t(s)["input_ids"] for k, t in styles.items()})
        c["no_bos_first"] = styles["first"](s, add_special_tokens=False)["input_ids"]
        if not any(x in s for x in ("<image>", "<pad>", "<s>", "</s>", "<unk>", "\u0000")):
            c["sentencepiece"] = sp.encode(s)
            assert c["ids"]["prepend"] == [1] + c["sentencepiece"] or not s, s
        cases.append(c)
    first = styles["first"]
    byte = lambda b: first.convert_tokens_to_ids(f"<0x{b:02X}>")
    seqs = [first(s)["input_ids"] for s in ("hi", " hi", "  hi there ", "Hello, world!", "\nhi", "a<image>b", "<image>\nWhat is this? ", "hi </s> there", "\U0001f600 ok", "caf\u00e9")]
    e = "\U0001f600".encode()
    hi = first("hi", add_special_tokens=False)["input_ids"]
    seqs += [[], [1], [2], [1, 2], hi, hi + hi, hi + [2], [1] + hi + [2], [n] + hi, hi + [n] + hi, [n + 1, n + 1, 1] + hi,
             [byte(x) for x in e], [byte(x) for x in e[:2]], [byte(x) for x in e[:3]] + hi, hi + [byte(x) for x in e] + hi, [byte(0xFF)], [byte(0xFF), byte(0xFE)] + hi,
             [byte(0xC3), byte(0xA9)], [byte(0xC3)] + hi + [byte(0xA9)], [byte(0x0A)] * 2, [byte(0x48), byte(0x69)], [0], [0] + hi, [byte(0x20)] + hi, [byte(x) for x in e] * 2 + [byte(0xF0)]]
    decodes = []
    for ids in seqs:
        d = dict(ids=ids)
        for skip in (False, True):
            a = first.decode(ids, skip_special_tokens=skip)
            assert all(a == styles[k].decode(ids, skip_special_tokens=skip) for k in ("prepend", "first_v5")), ids
            d["text_skip_special" if skip else "text"] = a
        decodes.append(d)
    return dict(vocab=n, added={"<image>": n, "<pad>": n + 1}, classes={k: type(t).__name__ for k, t in styles.items()}, cases=cases, decode=decodes)


def make_tokenizer(out, assets):
    result = {}
    model = Path(assets, "llama", "tokenizer.model") if assets else None
    if model and model.is_file():
        c = tokenizer_cases(model, 32000, STRINGS)
        c["model"] = "llama/tokenizer.model of the shared assets (not in this repository)"
        write_json_compact(out / "tokenizer" / "cases.json", c)
        result["llama"] = len(c["cases"])
    small = out / "llava" / "with_tokenizer" / "tokenizer.model"
    if small.is_file():
        c = tokenizer_cases(small, 340, SMALL)
        c["model"] = "llava/with_tokenizer/tokenizer.model"
        write_json_compact(out / "tokenizer" / "cases_small.json", c)
        result["small"] = len(c["cases"])
    return result


def write_json_compact(path, value):
    """One case per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for k, v in value.items():
        if isinstance(v, list):
            parts.append(json.dumps(k) + ": [\n" + ",\n".join(json.dumps(x, separators=(",", ":")) for x in v) + "\n]")
        else:
            parts.append(json.dumps(k) + ": " + json.dumps(v))
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


# ------------------------------------------------------------------------------------------------- E: images
def noise_array(w, h, seed, noise=24):
    y, x = np.mgrid[0:h, 0:w].astype(np.float64)
    a = np.stack([255 * x / max(w - 1, 1), 255 * y / max(h - 1, 1), 127.5 + 127.5 * np.sin((x + 2 * y) / 5.0)], -1)
    a += np.random.RandomState(seed).randint(-noise, noise + 1, a.shape)
    return np.clip(np.round(a), 0, 255).astype(np.uint8)


def noise_image(w, h, seed, noise=24):
    return Image.fromarray(noise_array(w, h, seed, noise))


def png16(a):
    """A 16-bit PNG (grey or RGB) written by hand: Pillow has no writer for 16-bit RGB."""
    h, w = a.shape[:2]
    colour = 0 if a.ndim == 2 else 2
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in a)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, colour, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b""))


def make_images(out):
    from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil
    d = out / "images"
    shutil.rmtree(d, ignore_errors=True)
    d.mkdir(parents=True)

    def png(name, image, **kw):
        image.save(d / name, format="PNG", compress_level=9, **kw)

    png("rgb_5x7.png", noise_image(5, 7, 1))
    png("rgb_64x64.png", noise_image(64, 64, 2))
    png("rgb_97x33.png", noise_image(97, 33, 3))
    png("rgb_33x97.png", noise_image(33, 97, 4))
    png("rgb_200x150.png", noise_image(200, 150, 6, 3))
    png("rgb_1x40.png", noise_image(1, 40, 7))
    extreme = np.zeros((40, 52, 3), np.uint8)      # hard edges: bicubic overshoot must clip at 0 and 255
    extreme[::2, ::3] = 255
    extreme[10:20] = 255
    extreme[:, 30:41, 1] = 255
    png("rgb_edges_52x40.png", Image.fromarray(extreme))
    a = noise_array(41, 29, 8)
    alpha = np.random.RandomState(9).randint(0, 256, (29, 41, 1)).astype(np.uint8)
    alpha[:8], alpha[-8:] = 0, 255
    png("rgba_41x29.png", Image.fromarray(np.concatenate([a, alpha], -1)))
    png("grey_31x45.png", Image.fromarray(noise_array(31, 45, 10)[..., 2]))
    png("greyalpha_31x23.png", Image.merge("LA", [Image.fromarray(noise_array(31, 23, 11)[..., 2]), Image.fromarray(noise_array(31, 23, 12)[..., 0])]))
    pal = noise_image(39, 30, 13).quantize(48, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    png("palette_39x30.png", pal)
    png("palette_trns_39x30.png", pal, transparency=5)
    png("bilevel_37x29.png", Image.fromarray(noise_array(37, 29, 14)[..., 2] > 127))
    g16 = np.random.RandomState(15).randint(0, 65536, (26, 34)).astype(np.uint16)
    g16[:, :17] = (np.arange(26)[:, None] * 20 + np.arange(17)[None]).astype(np.uint16)   # small values too
    (d / "grey16_34x26.png").write_bytes(png16(g16))
    rgb16 = np.random.RandomState(16).randint(0, 65536, (24, 30, 3)).astype(np.uint16)
    (d / "rgb16_30x24.png").write_bytes(png16(rgb16))
    noise_image(61, 45, 17, 10).save(d / "photo420_61x45.jpg", quality=85, subsampling=2)
    noise_image(48, 56, 18, 10).save(d / "progressive444_48x56.jpg", quality=92, subsampling=0, progressive=True)
    Image.fromarray(noise_array(35, 37, 19, 10)[..., 2]).save(d / "grey_35x37.jpg", quality=90)

    clip = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    llava = LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_pad=True)
    pixel_files = {"rgb_5x7", "rgb_64x64", "rgb_97x33", "rgb_33x97", "rgb_200x150", "rgb_edges_52x40", "rgba_41x29", "palette_trns_39x30", "grey_31x45", "rgb_1x40"}
    resize_to = {"rgb_5x7": [(31, 17), (5, 14), (3, 2), (1, 1)], "rgb_64x64": [(28, 28), (64, 20), (20, 64)], "rgb_97x33": [(82, 28), (28, 28)],
                 "rgb_33x97": [(28, 82), (28, 28)], "rgb_200x150": [(37, 28), (32, 24), (7, 101)], "rgb_edges_52x40": [(36, 28), (13, 10), (70, 53)], "rgb_1x40": [(28, 60), (3, 3)]}
    info = dict(pillow=PIL.__version__, transformers=transformers.__version__, clip_class="CLIPImageProcessorPil", pad_class="LlavaImageProcessorPil",
                clip_size=28, pad_fill=[int(255 * m) for m in CLIP_MEAN], files={})
    for f in sorted(p for p in d.iterdir() if p.suffix in (".png", ".jpg")):
        im = Image.open(f)
        im.load()
        rgb = Image.fromarray(np.array(im.convert("RGB")))  # a copy: convert() keeps info["transparency"], which transformers reads
        t = {}
        e = dict(mode=im.mode, size=list(im.size))
        simple = im.mode == "RGB" and f.suffix == ".png" and "16" not in f.stem.split("_")[0]
        if not simple:
            t["rgb"] = torch.from_numpy(np.array(rgb))
        from transformers.image_transforms import convert_to_rgb
        white = convert_to_rgb(im, return_numpy=True)
        e["transformers_rgb_differs"] = bool((white != np.array(rgb)).any())
        if e["transformers_rgb_differs"]:
            t["rgb_transformers"] = torch.from_numpy(white.copy())
        for w, h in resize_to.get(f.stem, []):
            t[f"bicubic.{w}x{h}"] = torch.from_numpy(np.array(rgb.resize((w, h), Image.Resampling.BICUBIC)))
        if f.stem in ("rgb_64x64", "rgb_5x7"):
            for k in ("LANCZOS", "BILINEAR", "BOX", "HAMMING"):
                w, h = (29, 23) if f.stem == "rgb_64x64" else (13, 11)
                t[f"{k.lower()}.{w}x{h}"] = torch.from_numpy(np.array(rgb.resize((w, h), getattr(Image.Resampling, k))))
        if f.stem in pixel_files:
            # from the RGB image (alpha dropped), so that the pixels that go in are the same everywhere
            t["pixel_values"] = torch.from_numpy(np.asarray(clip(rgb, return_tensors="np")["pixel_values"][0]))
            padded = llava(rgb, return_tensors="np")["pixel_values"][0]
            t["pixel_values_pad"] = torch.from_numpy(np.asarray(padded))
            # the original LLaVA code path: paste on a square of int(255*mean), then CLIPImageProcessor
            w, h = rgb.size
            sq = Image.new("RGB", (max(w, h),) * 2, tuple(int(255 * m) for m in CLIP_MEAN))
            sq.paste(rgb, ((max(w, h) - w) // 2, (max(w, h) - h) // 2))
            assert np.array_equal(clip(sq, return_tensors="np")["pixel_values"][0], padded)
        if f.stem == "rgb_97x33":     # resize to 36, crop 28; and resize to 24, crop 28 (zero border before normalisation)
            for s in (36, 24):
                p = CLIPImageProcessorPil(size={"shortest_edge": s}, crop_size={"height": 28, "width": 28})
                t[f"pixel_values.size{s}_crop28"] = torch.from_numpy(np.asarray(p(rgb, return_tensors="np")["pixel_values"][0]))
        if f.stem == "rgb_33x97":     # odd difference between size and crop; 31x17 crop
            p = CLIPImageProcessorPil(size={"shortest_edge": 33}, crop_size={"height": 28, "width": 32})
            t["pixel_values.size33_crop32x28"] = torch.from_numpy(np.asarray(p(rgb, return_tensors="np")["pixel_values"][0]))
        t = {k: (v.float() if v.is_floating_point() else v) for k, v in t.items()}
        e["keys"] = {k: list(v.shape) for k, v in sorted(t.items())}
        if t:
            save(d / (f.stem + ".safetensors"), t)
        info["files"][f.name] = e
    write_json(d / "index.json", info)
    return dict(files=len(info["files"]))


# ------------------------------------------------------------------------------------------------- F: templates
VICUNA_SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
                 "answers to the user's questions.")


def make_templates(out):
    """Written by hand; see README.md for the sources. A case: system or null, turns [user, answer], the last answer null."""
    q, a, q2, sysm = "What is this?", "A cat.", "What colour is it?", "Be brief."
    img = "<image>\n"
    V = VICUNA_SYSTEM
    one, two = [[img + q, None]], [[img + q, a], [q2, None]]
    text, three = [[q, None]], [[img + q, a], [q2, "Red."], ["Sure?", None]]
    multi = [[img + img + q, None]]
    T = {
        "plain": [
            (None, one, "<image>\nWhat is this?\n"), (None, text, "What is this?\n"), (None, [["<image>", None]], "<image>\n"),
        ],
        "vicuna_v1": [
            (None, one, f"{V} USER: <image>\nWhat is this? ASSISTANT:"), (None, text, f"{V} USER: What is this? ASSISTANT:"),
            (None, two, f"{V} USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: What colour is it? ASSISTANT:"),
            (None, three, f"{V} USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: What colour is it? ASSISTANT: Red.</s>USER: Sure? ASSISTANT:"),
            (sysm, one, "Be brief. USER: <image>\nWhat is this? ASSISTANT:"), (None, multi, f"{V} USER: <image>\n<image>\nWhat is this? ASSISTANT:"),
        ],
        "llava-hf": [
            (None, one, "USER: <image>\nWhat is this? ASSISTANT:"), (None, text, "USER: What is this? ASSISTANT:"),
            (None, two, "USER: <image>\nWhat is this? ASSISTANT: A cat. USER: What colour is it? ASSISTANT:"),
            (None, three, "USER: <image>\nWhat is this? ASSISTANT: A cat. USER: What colour is it? ASSISTANT: Red. USER: Sure? ASSISTANT:"),
            (sysm, one, "Be brief. USER: <image>\nWhat is this? ASSISTANT:"), (None, multi, "USER: <image>\n<image>\nWhat is this? ASSISTANT:"),
        ],
        "mistral": [
            (None, one, "<s>[INST] <image>\nWhat is this? [/INST]"), (None, text, "<s>[INST] What is this? [/INST]"),
            (None, two, "<s>[INST] <image>\nWhat is this? [/INST]A cat.</s>[INST] What colour is it? [/INST]"),
            (None, three, "<s>[INST] <image>\nWhat is this? [/INST]A cat.</s>[INST] What colour is it? [/INST]Red.</s>[INST] Sure? [/INST]"),
        ],
        "llama-2": [
            (None, one, "<s>[INST] <image>\nWhat is this? [/INST]"), (None, text, "<s>[INST] What is this? [/INST]"),
            (sysm, one, "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat is this? [/INST]"),
            (None, two, "<s>[INST] <image>\nWhat is this? [/INST] A cat. </s><s>[INST] What colour is it? [/INST]"),
            (sysm, two, "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat is this? [/INST] A cat. </s><s>[INST] What colour is it? [/INST]"),
            (sysm, three, "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat is this? [/INST] A cat. </s><s>[INST] What colour is it? [/INST] Red. </s>"
                          "<s>[INST] Sure? [/INST]"),
        ],
    }
    # the llava-hf rules once more through jinja
    import jinja2
    tpl = jinja2.Environment().from_string(HUB_TEMPLATE)
    for system, turns, want in T["llava-hf"]:
        messages = [dict(role="system", content=[dict(type="text", text=system)])] if system else []
        for u, ans in turns:
            messages.append(dict(role="user", content=[dict(type="image")] * u.count(img) + [dict(type="text", text=u.replace(img, ""))]))
            if ans is not None:
                messages.append(dict(role="assistant", content=[dict(type="text", text=ans)]))
        assert tpl.render(messages=messages, add_generation_prompt=True) == want, want
    # the same conversations in LLaVA's own conversation.py (templates "llava_llama_2" and "mistral_instruct")
    variants = {
        "llava_llama_2": [(sysm, two, T["llama-2"][4][2][len("<s>"):]), (None, one, T["llama-2"][0][2][len("<s>"):])],
        "llava_mistral_instruct": [(None, one, "[INST] <image>\nWhat is this? [/INST]"),
                                   (None, two, "[INST] <image>\nWhat is this? [/INST] A cat. </s>[INST] What colour is it? [/INST]")],
    }
    cases = lambda v: [dict(system=s, turns=[dict(user=u, assistant=x) for u, x in turns], rendered=r) for s, turns, r in v]
    write_json(out / "templates.json", {
        "note": "rendered strings that begin with <s> carry their own BOS: the tokenizer must not add a second one",
        "rendered_has_bos": {"plain": False, "vicuna_v1": False, "llava-hf": False, "mistral": True, "llama-2": True},
        "stop_after_answer": {"plain": "\n", "vicuna_v1": "</s>", "llava-hf": "</s>", "mistral": "</s>", "llama-2": "</s>"},
        "default_system": {"vicuna_v1": V},
        "cases": {k: cases(v) for k, v in T.items()},
        "variants": {k: cases(v) for k, v in variants.items()},
    })
    return {k: len(v) for k, v in T.items()}


# ------------------------------------------------------------------------------------------------- main
def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    ap.add_argument("--assets", type=Path, help="the shared assets; without them tokenizer/cases.json is not made")
    ap.add_argument("--only", default="llama,clip,llava,tokenizer,images,templates")
    args = ap.parse_args()
    steps = dict(llama=lambda: make_llama(args.out), clip=lambda: make_clip(args.out), llava=lambda: make_llava(args.out),
                 tokenizer=lambda: make_tokenizer(args.out, args.assets), images=lambda: make_images(args.out), templates=lambda: make_templates(args.out))
    for name in args.only.split(","):
        print(name, json.dumps(steps[name]()), flush=True)
    for f in args.out.rglob("*.safetensors"):
        f.chmod(0o644)


if __name__ == "__main__":
    main()

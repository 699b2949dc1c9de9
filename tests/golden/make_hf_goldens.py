#!/usr/bin/env python3
"""Makes tests/golden/pytorch, native and adapters: torch.save files, LLaVA's own layout, PEFT adapters. All seeded and tiny: two runs write the same bytes.

    python make_hf_goldens.py [--out DIR] [--only pytorch,native,adapters]

Needs the goldens of make_goldens.py beside it, and for `adapters` the package peft. README.md says what is in each file.
"""
import argparse
import collections
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file

from make_goldens import save, write_json

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent


# ------------------------------------------------------------------------------------------------- torch.save
def torch_save(value, path, **kw):
    torch.save(value, path, **kw)
    Path(path).chmod(0o644)


def make_pytorch(out):
    d = out / "pytorch"
    shutil.rmtree(d, ignore_errors=True)
    d.mkdir(parents=True)
    base = torch.arange(24.0).reshape(4, 6)
    cube = torch.arange(60.0).reshape(3, 4, 5)
    layouts = collections.OrderedDict(
        plain=base, transposed=base.t(), part=base[1:3, 2:5], row=base[2], column=base[:, 3], step=torch.arange(20.0)[1::3], permuted=cube.permute(2, 0, 1),
        tied=base.t(), one=torch.tensor(2.5), none=torch.zeros(0, 3), wide=torch.ones(1, 3).as_strided((1, 3), (77, 1)),
        parameter=torch.nn.Parameter(torch.linspace(-1, 1, 5)))
    torch_save(layouts, d / "layouts.bin")
    dtypes = dict(f64=torch.tensor([1.5, -2.25], dtype=torch.float64), f32=torch.tensor([1.5, -2.25]), f16=torch.tensor([1.5, -2.25]).half(),
                  bf16=torch.tensor([1.5, -2.25]).bfloat16(), i64=torch.tensor([-3, 1 << 40]), i32=torch.tensor([-3, 1 << 20], dtype=torch.int32),
                  i16=torch.tensor([-3, 300], dtype=torch.int16), i8=torch.tensor([-3, 100], dtype=torch.int8), u8=torch.tensor([3, 200], dtype=torch.uint8),
                  boolean=torch.tensor([True, False]))
    torch_save(dtypes, d / "dtypes.bin", pickle_protocol=4)
    torch_save({**dtypes, "epoch": 3, "rate": 0.5, "note": "x", "flag": True, "nothing": None, "list": [1, 2], "pair": (1, 2, 3, 4)}, d / "dtypes_p2.bin")
    module = torch.nn.Sequential(collections.OrderedDict(linear=torch.nn.Linear(3, 2), norm=torch.nn.LayerNorm(2)))
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(torch.arange(float(p.numel())).reshape(p.shape) + 10 * i)
    torch_save(module.state_dict(), d / "module.bin")  # with _metadata, by BUILD
    save(d / "layouts.safetensors", layouts)
    save(d / "dtypes.safetensors", dtypes)
    save(d / "module.safetensors", module.state_dict())
    # What must be refused.
    torch_save(base, d / "bare_tensor.bin")
    torch_save(module, d / "whole_module.bin")
    torch_save({"state": module.state_dict(), "epoch": 3}, d / "nested.bin")
    torch_save({"w": torch.ones(1).expand(5)}, d / "expanded.bin")
    # A checkpoint in two shards: the weights of llama/gqa_llama3_tied_f16, whose golden it shares.
    source = out / "llama/gqa_llama3_tied_f16"
    shards = d / "shards"
    shards.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(source / name, shards / name)
    weights = load_file(source / "model.safetensors")
    names = sorted(weights)
    index = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2:])):
        file = f"pytorch_model-0000{i + 1}-of-00002.bin"
        torch_save(collections.OrderedDict((n, weights[n]) for n in part), shards / file)
        index.update({n: file for n in part})
    write_json(shards / "pytorch_model.bin.index.json", dict(metadata=dict(total_size=sum(w.nbytes for w in weights.values())), weight_map=index))
    return {p.name: p.stat().st_size for p in sorted(d.rglob("*.bin"))}


# ------------------------------------------------------------------------------------------------- LLaVA's own layout
ADDED = {"<im_patch>": 340, "<im_start>": 341, "<im_end>": 342}
UNUSED = 350  # transformers needs an id for a picture's rows; LLaVA's own layout has none


def native_key(key):
    """A name of transformers' state_dict as LLaVA's own code writes it."""
    for ours, theirs in (("model.language_model.", "model."), ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
                         ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."), ("model.multi_modal_projector.linear.", "model.mm_projector."),
                         ("model.vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model."),
                         ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")):
        if key.startswith(ours):
            return theirs + key[len(ours):]
    return key


def encode_stretches(sp, text):
    """As the slow LLaMA tokenizer does in its old behaviour: each stretch between added tokens by sentencepiece."""
    ids, rest = [], text
    while rest:
        at, token = min(((rest.find(t), t) for t in ADDED if t in rest), default=(len(rest), None))
        ids += sp.encode(rest[:at]) if at else []
        ids += [ADDED[token]] if token else []
        rest = rest[at + len(token or ""):]
    return ids


def tokenizer_image_token(sp, prompt):
    """Text between pictures, tokenized piece by piece, with -200 for each picture and one BOS (in our own words)."""
    pieces = [encode_stretches(sp, p) for p in prompt.split("<image>")]
    ids = [1] + pieces[0]
    for piece in pieces[1:]:
        ids += [-200] + piece
    return ids


def make_native(out):
    from PIL import Image
    from sentencepiece import SentencePieceProcessor
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig
    from make_goldens import preprocessor_config, randomize, special, tokenizer_config, write_json as wj

    d = out / "native"
    shutil.rmtree(d, ignore_errors=True)
    vocabulary = out / "llava/with_tokenizer/tokenizer.model"
    sp = SentencePieceProcessor(model_file=str(vocabulary))
    picture = Image.open(out / "llava/with_tokenizer/picture.png").convert("RGB")
    report = {}
    text = dict(vocab_size=352, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=None,
                rope_parameters=dict(rope_type="default", rope_theta=10000.0))
    vision = CLIPVisionConfig(hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, projection_dim=12)
    # name -> (text config, projector, layer, feature, aspect, start and end, template, seed)
    table = {
        "inside": (LlamaConfig(**text), "mlp2x_gelu", -2, "patch", "pad", True, "vicuna", 71),
        "apart": (MistralConfig(**text, head_dim=8, sliding_window=None), "linear", -1, "cls_patch", "square", False, "mistral", 72),
    }
    questions = {"vicuna": "<image>\nWhat shape is in the picture?", "mistral": "Here <image> and <image>\nWhat is there?"}
    system = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the "
              "user's questions.")
    for name, (tc, projector, layer, feature, aspect, wrap, template, seed) in table.items():
        config = LlavaConfig(vision_config=vision, text_config=tc, image_token_index=UNUSED, vision_feature_layer=layer,
                             vision_feature_select_strategy="default" if feature == "patch" else "full", projector_hidden_act="gelu",
                             image_seq_length=4 if feature == "patch" else 5)
        config._attn_implementation = "eager"
        model = LlavaForConditionalGeneration(config)
        if projector == "linear":  # transformers has none of one layer
            module = torch.nn.Module()
            module.linear = torch.nn.Linear(12, 16)
            module.forward = lambda x, m=module: m.linear(x)
            model.model.multi_modal_projector = module
        randomize(model, seed)
        # the native directory
        n = d / name
        n.mkdir(parents=True)
        shutil.copyfile(vocabulary, n / "tokenizer.model")
        wj(n / "added_tokens.json", ADDED)
        tk = tokenizer_config(340, True)
        tk["added_tokens_decoder"] = {str(i): special(x) for i, x in [(0, "<unk>"), (1, "<s>"), (2, "</s>")] + [(i, x) for x, i in ADDED.items()]}
        tk.pop("processor_class"), tk.pop("pad_token")
        wj(n / "tokenizer_config.json", tk)
        native = dict(_name_or_path=f"tiny-{template}", architectures=["LlavaMistralForCausalLM" if name == "apart" else "LlavaLlamaForCausalLM"],
                      bos_token_id=1, eos_token_id=2, freeze_mm_mlp_adapter=False, hidden_act="silu", hidden_size=16, image_aspect_ratio=aspect,
                      image_grid_pinpoints=None, initializer_range=0.02, intermediate_size=24, max_position_embeddings=512, mm_hidden_size=12,
                      mm_projector_type=projector, mm_resampler_type=None, mm_use_im_patch_token=False, mm_use_im_start_end=wrap,
                      mm_vision_select_feature=feature, mm_vision_select_layer=layer, mm_vision_tower="openai/clip-vit-tiny-patch14",
                      model_type="llava_mistral" if name == "apart" else "llava", num_attention_heads=2, num_hidden_layers=2, num_key_value_heads=2,
                      pad_token_id=0, rms_norm_eps=1e-05, rope_scaling=None, tie_word_embeddings=False, torch_dtype="float32",
                      transformers_version="4.31.0", tune_mm_mlp_adapter=False, unfreeze_mm_vision_tower=False, use_cache=True, use_mm_proj=True,
                      vocab_size=352)
        if name == "apart":
            native["sliding_window"] = None
        wj(n / "config.json", native)
        state = {native_key(k): v.detach().contiguous().clone() for k, v in model.state_dict().items()}
        tower = n / "clip-vit-tiny-patch14" if name == "inside" else d / "towers" / "clip-vit-tiny-patch14"
        tower.mkdir(parents=True)
        wj(tower / "config.json", dict(model_type="clip", vision_config=dict(vision.to_diff_dict(), model_type="clip_vision_model")))
        wj(tower / "preprocessor_config.json", preprocessor_config(28, 28))
        prefix = "model.vision_tower.vision_tower."
        if name == "inside":
            torch_save(collections.OrderedDict(sorted(state.items())), n / "pytorch_model.bin")
        else:
            save(n / "model.safetensors", {k: v for k, v in state.items() if not k.startswith(prefix)})
            save(tower / "model.safetensors", {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)})
        # the golden
        question = questions[template]
        wrapped = question.replace("<image>", "<im_start><image><im_end>") if wrap else question
        prompt = f"{system} USER: {wrapped} ASSISTANT:" if template == "vicuna" else f"[INST] {wrapped} [/INST]"
        ids = tokenizer_image_token(sp, prompt)
        image = picture
        if aspect == "pad":
            side = max(image.size)
            image = Image.new("RGB", (side, side), (122, 116, 104))
            image.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        px = torch.tensor(CLIPImageProcessor(**preprocessor_config(28, 28))(image)["pixel_values"][0])[None]
        pictures = ids.count(-200)
        rows = config.image_seq_length
        expanded = [x for i in ids for x in ([UNUSED] * rows if i == -200 else [i])]
        with torch.no_grad():
            o = model(input_ids=torch.tensor([expanded]), pixel_values=px.repeat(pictures, 1, 1, 1), use_cache=False)
            vt = model.model.vision_tower(px, output_hidden_states=True).hidden_states[layer]
            features = model.model.multi_modal_projector(vt[:, 1:] if feature == "patch" else vt)[0]
        save(n / "golden.safetensors", dict(pixel_values=px[0], features=features, logits=o.logits[0, -32:]))
        wj(n / "golden.json", dict(question=question, prompt=prompt, ids=ids, rows=rows, pictures=pictures))
        report[name] = dict(tokens=len(expanded), bytes=sum(p.stat().st_size for p in n.rglob("*") if p.is_file()))
    return report


# ------------------------------------------------------------------------------------------------- PEFT adapters
def make_adapters(out):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

    d = out / "adapters"
    shutil.rmtree(d, ignore_errors=True)
    report = {}
    plain = dict(lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")
    # name -> (class, base, peft's arguments, seed)
    table = {
        "attention": (LlamaForCausalLM, "llama/mha_plain", dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], **plain), 81),
        "all_rslora": (LlamaForCausalLM, "llama/mqa_llama3_hd10", dict(
            r=3, lora_alpha=5, use_rslora=True, modules_to_save=["lm_head", "norm"], rank_pattern={"gate_proj": 2}, alpha_pattern={"layers.1.mlp.down_proj": 9},
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], **plain), 82),
        "llava": (LlavaForConditionalGeneration, "llava/old_keys_m2_default", dict(
            r=2, lora_alpha=4, target_modules=["o_proj", "up_proj", "fc1", "linear_1"], **{**plain, "task_type": None}), 83),
    }
    for name, (Model, base, arguments, seed) in table.items():
        model = Model.from_pretrained(out / base, dtype=torch.float32, attn_implementation="eager").eval()
        model = get_peft_model(model, LoraConfig(**arguments))
        gen = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for n, p in sorted(model.named_parameters()):
                if p.requires_grad:
                    # larger than a training leaves them: an adapter that is not applied must be seen
                    p.copy_(p + torch.randn(p.shape, generator=gen) * (0.5 if "lora_" in n else 0.1))
        a = d / name
        a.mkdir(parents=True)
        model.save_pretrained(a)
        for extra in a.iterdir():
            if extra.name not in ("adapter_config.json", "adapter_model.safetensors"):
                extra.unlink()
        config = json.loads((a / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = base
        for key in ("target_modules", "modules_to_save"):
            if isinstance(config.get(key), list):
                config[key] = sorted(config[key])  # a set, written in any order
        write_json(a / "adapter_config.json", config)
        tensors = load_file(a / "adapter_model.safetensors")
        (a / "adapter_model.safetensors").unlink()
        save(a / "adapter_model.safetensors", tensors)
        record = load_file(out / base / ("golden_2img.safetensors" if name == "llava" else "golden.safetensors"))
        ids = record["input_ids"].long()
        extra = dict(pixel_values=record["pixel_values"]) if name == "llava" else {}
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False, **extra).logits[0]
            if name == "llava":
                inner = model.base_model.model.model
                features = inner.multi_modal_projector(inner.vision_tower(extra["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:])
                golden = dict(logits=logits, features=features)
            else:
                golden = dict(logits=logits)
        moved = float((logits - record["logits"]).abs().max() / record["logits"].abs().max())
        assert moved > 0.05, (name, moved)
        save(a / "golden.safetensors", golden)
        report[name] = dict(tensors=len(tensors), moved=round(moved, 3), names=sorted(tensors)[:2])
    return report


# ------------------------------------------------------------------------------------------------- main
def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, default=HERE)
    ap.add_argument("--only", default="pytorch,native,adapters")
    args = ap.parse_args()
    steps = dict(pytorch=make_pytorch, native=make_native, adapters=make_adapters)
    for name in args.only.split(","):
        print(name, json.dumps(steps[name](args.out)), flush=True)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What PyTorch does in the two training runs that tests/unit/train_goldens.cpp repeats.

    python make_train_goldens.py --assets ASSETS [--only adamw,stories,easy_vqa]

adamw.json         20 steps of torch.optim.AdamW in f64 on a small vector.
stories260K.json   10 steps of torch.optim.AdamW on one text, by the recipe of golden/stories260K in the shared assets, whose
                   losses the script checks its own against. Per step: loss and norm of all gradients. Of every parameter: the
                   norm of its first gradient; after the last step its norm, that of its change, and some of its elements.
easy_vqa.json      200 steps of a tiny LLaVA (config.json) on easy-VQA's train/, the tower frozen: loss, gradient norm and
                   learning rate per step. The model begins with the values of m2lm::Model::from_config, which are computed
                   here once more from their definition. Batch s is the questions (8·s + 0 … 7)·7919 mod N, in this order.

Everything is f32 on one thread: two runs write the same bytes.
"""
import argparse
import json
import math
import os
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoTokenizer, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)

STEPS, BATCH, STRIDE, SEED = 200, 8, 7919, 20
PEAK, WARMUP, FLOOR = 3e-3, 20, 0.1
ADAMW = dict(betas=(0.9, 0.98), eps=1e-8, weight_decay=0.05)
CLIP = 1.0
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


# ---- stories260K ------------------------------------------------------------


def stories(assets):
    golden = json.loads((assets / "golden/stories260K/golden.json").read_text())
    recipe = golden["adamw"]
    model = LlamaForCausalLM.from_pretrained(assets / "llama/stories260K-hf", dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([golden["ids"]])
    parameters = dict(model.named_parameters())
    begin = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=recipe["lr"], betas=tuple(recipe["betas"]), eps=recipe["eps"],
                                  weight_decay=recipe["weight_decay"])
    losses, norms, first = [], [], None
    for _ in range(10):
        optimizer.zero_grad()
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits[0], ids[0, 1:])
        loss.backward()
        losses.append(loss.item())
        gradients = {n: p.grad.double().norm().item() for n, p in parameters.items()}
        norms.append(math.sqrt(sum(g * g for g in gradients.values())))
        first = first or gradients
        optimizer.step()
    for mine, recorded in zip(losses, recipe["losses"]):
        assert abs(mine - recorded) < 2e-6 * recorded, (mine, recorded)
    assert abs(norms[0] - golden["global_grad_norm"]) < 1e-5 * norms[0]
    out = dict(adamw=recipe, ids=golden["ids"], losses=losses, gradient_norms=norms, parameters={})
    for n, p in sorted(parameters.items()):
        p = p.detach()
        flat = p.reshape(-1)
        at = [(i * 7919) % flat.numel() for i in range(6)]
        out["parameters"][n] = dict(first_gradient_norm=first[n], norm=p.double().norm().item(),
                                    change_norm=(p - begin[n]).double().norm().item(), at=at, values=[flat[i].item() for i in at])
    write_json(HERE / "stories260K.json", out)


# ---- AdamW alone --------------------------------------------------------------


def adamw():
    """20 steps in f64 on one vector, with gradients by formula, once as they are and once clipped."""
    begin = [0.5, -1.25, 2.0, 1e-3, -3.0, 0.0]
    out = dict(lr=0.05, betas=[0.8, 0.95], eps=1e-6, weight_decay=0.1, begin=begin, max_norm=0.7)
    for name, clip in (("free", None), ("clipped", 0.7)):
        x = torch.tensor(begin, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.AdamW([x], lr=0.05, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
        rows = []
        for t in range(20):
            x.grad = torch.tensor([((t * (2 * i + 3) + i) % 11 - 5) / 8 for i in range(len(begin))], dtype=torch.float64)
            if clip:
                torch.nn.utils.clip_grad_norm_([x], clip)
            optimizer.step()
            rows.append(x.tolist())
        out[name] = rows
    write_json(HERE / "adamw.json", out)


# ---- the values of Model::from_config ----------------------------------------


def philox(counters, key):
    """Philox4x32-10 of counters (lo, hi, 0, 0), vectorised. Returns 64-bit words, as m2lm::Rng::next."""
    mask = np.uint64(0xFFFFFFFF)
    c = [counters & mask, counters >> np.uint64(32), np.zeros_like(counters), np.zeros_like(counters)]
    k = [np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32)]
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k[0], p1 & mask, (p0 >> np.uint64(32)) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + np.uint64(0x9E3779B9)) & mask, (k[1] + np.uint64(0xBB67AE85)) & mask]
    return (c[1] << np.uint64(32)) | c[0]


def normal(name, seed, count):
    """Box and Muller's cosine half of pairs of uniform numbers; the stream of a tensor is its name's FNV-1a hash xor the seed."""
    key = 0xCBF29CE484222325
    for byte in name.encode():
        key = ((key ^ byte) * 0x100000001B3) % 2**64
    words = philox(np.arange(2 * count, dtype=np.uint64), key ^ seed)
    uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.sqrt(-2.0 * np.log(1.0 - uniform[0::2])) * np.cos(2.0 * np.pi * uniform[1::2])


def initial_value(name, shape, config):
    """transformers' initialisation: normal with initializer_range, CLIP's own deviations, norms 1, biases 0."""
    vision = config["vision_config"]
    width, layers = vision["hidden_size"], vision["num_hidden_layers"]
    if "norm" in name:
        return np.full(shape, 1.0 if name.endswith("weight") else 0.0)
    if name.endswith("bias"):
        return np.zeros(shape)
    deviation = config["text_config"].get("initializer_range", 0.02)
    if name.startswith("vision_tower."):
        part = name.rsplit(".", 2)[-2 if name.endswith("weight") else -1]
        deviation = {"class_embedding": width**-0.5, "patch_embedding": 0.02, "position_embedding": 0.02, "out_proj": width**-0.5,
                     "q_proj": (width * 2 * layers)**-0.5, "k_proj": (width * 2 * layers)**-0.5,
                     "v_proj": (width * 2 * layers)**-0.5, "fc1": (2 * width)**-0.5, "fc2": (width * 2 * layers)**-0.5}[part]
    return deviation * normal(name, SEED, int(np.prod(shape))).reshape(shape)


def canonical(name):
    """m2lm's name of a parameter of transformers' LlavaForConditionalGeneration."""
    name = name.replace("model.language_model.", "model.", 1)
    for part in ("multi_modal_projector.", "vision_tower."):
        name = name.replace("model." + part, part, 1)
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name


# ---- easy-VQA ----------------------------------------------------------------


def rate(step):
    """Linear warm-up, then a cosine down to a share of the peak."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    progress = (step - WARMUP) / (STEPS - WARMUP)
    return PEAK * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def easy_vqa(assets):
    config = json.loads((HERE / "config.json").read_text())
    llava = LlavaConfig(**config)
    llava._attn_implementation = "eager"
    model = LlavaForConditionalGeneration(llava).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(initial_value(canonical(name), tuple(p.shape), config)).float())
    for p in model.model.vision_tower.parameters():
        p.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, **ADAMW)

    data = assets / "data/easy_vqa/train"
    questions = json.loads((data / "questions.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(HERE.parents[2] / "assets/easy-vqa")
    image, tokens = config["image_token_index"], (config["vision_config"]["image_size"] // config["vision_config"]["patch_size"])**2

    def example(question, answer):
        prompt = tokenizer(f"USER: <image>\n{question} ASSISTANT:").input_ids
        whole = tokenizer(f"USER: <image>\n{question} ASSISTANT: {answer}").input_ids
        assert prompt[0] == 1 and whole[:len(prompt)] == prompt and prompt.count(image) == 1
        at = prompt.index(image)
        ids = prompt[:at] + [image] * tokens + whole[at + 1:] + [2]
        labels = [-100] * (len(prompt) - 1 + tokens) + whole[len(prompt):] + [2]
        return torch.tensor(ids), torch.tensor(labels)

    def pixels(i):
        rgb = np.asarray(Image.open(data / "images" / f"{i}.png").convert("RGB")).astype(np.float64) / 255.0
        return torch.from_numpy(((rgb - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)).float()

    out = dict(steps=STEPS, batch=BATCH, stride=STRIDE, seed=SEED, questions=len(questions), peak=PEAK, warmup=WARMUP, floor=FLOOR,
               betas=ADAMW["betas"], eps=ADAMW["eps"], weight_decay=ADAMW["weight_decay"], max_gradient_norm=CLIP,
               first_ids=example(*questions[0][:2])[0].tolist(), losses=[], gradient_norms=[], learning_rates=[])
    for step in range(STEPS):
        optimizer.zero_grad()
        total, counted = 0.0, 0
        for b in range(BATCH):
            question, answer, i = questions[(BATCH * step + b) * STRIDE % len(questions)]
            ids, labels = example(question, answer)
            logits = model(input_ids=ids[None], pixel_values=pixels(i)[None], use_cache=False).logits[0]
            total = total + F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
            counted += int((labels != -100).sum())
        loss = total / counted
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        out["losses"].append(loss.item())
        out["gradient_norms"].append(norm.item())
        out["learning_rates"].append(rate(step))
        if step % 20 == 0:
            print(step, loss.item(), norm.item(), flush=True)
    write_json(HERE / "easy_vqa.json", out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, help="the shared assets")
    parser.add_argument("--only", default="adamw,stories,easy_vqa")
    arguments = parser.parse_args()
    for part in arguments.only.split(","):
        {"adamw": lambda _: adamw(), "stories": stories, "easy_vqa": easy_vqa}[part](arguments.assets)


if __name__ == "__main__":
    main()

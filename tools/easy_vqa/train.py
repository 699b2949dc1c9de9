#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains the bundled model: a very small LLaVA that knows easy-VQA's shapes.

Two stages, as training from scratch in one stage stalls:
  1. the vision tower learns, patch by patch, which shape and colour it sees
     (two linear heads, thrown away afterwards);
  2. projector and decoder learn questions and captions.

It reads easy-VQA's train/ only; of that, the last 400 pictures are held out,
and only they choose anything. test/ is read by evaluate.py alone.

    python train.py --data EASY_VQA --work SCRATCH --out CHECKPOINT
"""
import argparse
import json
import math
import os
import random
import shutil
import tempfile
import time

import numpy as np
import sentencepiece as spm
import torch
import torch.nn.functional as F
from PIL import Image
from sentencepiece import sentencepiece_model_pb2
from transformers import (CLIPVisionConfig, GenerationConfig, LlamaConfig, LlamaTokenizer, LlavaConfig,
                          LlavaForConditionalGeneration)

import draw

HELD_OUT = 400
PIECES = 510  # <image> is 510, <pad> 511: 512 rows, a multiple of 64
IMAGE_ID, PAD_ID, ROWS = PIECES, PIECES + 1, PIECES + 2
PATCH, GRID = 8, draw.SIZE // 8
IMAGE_TOKENS = GRID * GRID
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
TEMPLATE = "USER: <image>\n{} ASSISTANT:"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


# ---- tokenizer -------------------------------------------------------------


def make_tokenizer(folder):
    """tokenizer.model as LLaMA's: BPE, bytes as fallback, no normalisation."""
    lines = []
    rng = random.Random(5)
    questions = draw.all_questions()
    for question in questions:
        lines += [f"USER: {question} ASSISTANT: yes", f"{draw.capitalize(question)} no"]
    for _ in range(1500):
        facts = [(rng.choice(draw.SHAPES), rng.choice(draw.COLOR_NAMES)) for _ in range(rng.randint(1, 2))]
        lines.append(f"USER: {draw.CAPTION_QUESTION} ASSISTANT: {draw.caption(facts)}")
    text = os.path.join(folder, "tokenizer_text.txt")
    with open(text, "w") as f:
        f.write("\n".join(lines) + "\n")
    printable = "".join(chr(c) for c in range(33, 127))
    spm.SentencePieceTrainer.train(
        input=text, model_prefix=os.path.join(folder, "tokenizer"), model_type="bpe", vocab_size=PIECES,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, byte_fallback=True, add_dummy_prefix=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, character_coverage=1.0, required_chars=printable,
        hard_vocab_limit=True, num_threads=1, minloglevel=2)
    model = os.path.join(folder, "tokenizer.model")
    proto = sentencepiece_model_pb2.ModelProto()
    with open(model, "rb") as f:
        proto.ParseFromString(f.read())
    del proto.trainer_spec.input[:]  # paths of this machine
    proto.trainer_spec.model_prefix = "tokenizer"
    with open(model, "wb") as f:
        f.write(proto.SerializeToString())
    return model


class Tokenizer:
    """transformers' LlamaTokenizer with legacy=false, written out.

    The text is cut at <image>; only the part that starts the text gets the
    dummy prefix (a space); every other part is tokenized as it stands.
    evaluate.py --check-tokenizer compares it with transformers.
    """

    def __init__(self, model):
        self.sp = spm.SentencePieceProcessor(model_file=model)

    def _bare(self, text):
        """Ids of `text` without the dummy prefix."""
        guard = "\x01"  # a byte piece: nothing merges with it
        head = self.sp.encode(guard)
        ids = self.sp.encode(guard + text)
        assert ids[:len(head)] == head
        return ids[len(head):]

    def encode(self, text, bos=True):
        ids = [1] if bos else []
        for i, part in enumerate(text.split("<image>")):
            if i:
                ids.append(IMAGE_ID)
            if part:
                ids += self._bare(part if i else " " + part)
        return ids

    def decode(self, ids):
        return self.sp.decode([i for i in ids if 2 < i < PIECES])


# ---- the checkpoint directory ----------------------------------------------


def make_config():
    vision = CLIPVisionConfig(hidden_size=128, intermediate_size=512, projection_dim=128, num_hidden_layers=4,
                              num_attention_heads=4, image_size=draw.SIZE, patch_size=PATCH, hidden_act="quick_gelu")
    text = LlamaConfig(vocab_size=ROWS, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                       num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, hidden_act="silu",
                       rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=PAD_ID,
                       tie_word_embeddings=False)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID,
                       projector_hidden_act="gelu", vision_feature_layer=-2,
                       vision_feature_select_strategy="default", image_seq_length=IMAGE_TOKENS,
                       tie_word_embeddings=False, pad_token_id=PAD_ID)


def _json(folder, name, value):
    with open(os.path.join(folder, name), "w") as f:
        json.dump(value, f, indent=2)
        f.write("\n")


def save_checkpoint(model, state, tokenizer_model, folder):
    """A Hugging Face LLaVA directory, laid out as llava-hf lays out its own."""
    os.makedirs(folder, exist_ok=True)
    rounded = LlavaForConditionalGeneration(model.config)
    rounded.load_state_dict(state)
    rounded = rounded.to(torch.bfloat16)
    rounded.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=PAD_ID)
    rounded.save_pretrained(folder)
    os.chmod(os.path.join(folder, "model.safetensors"), 0o644)
    with open(tokenizer_model, "rb") as source, open(os.path.join(folder, "tokenizer.model"), "wb") as target:
        target.write(source.read())

    def token(text):
        return {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}

    added = {0: "<unk>", 1: "<s>", 2: "</s>", IMAGE_ID: "<image>", PAD_ID: "<pad>"}
    _json(folder, "added_tokens.json", {"<image>": IMAGE_ID, "<pad>": PAD_ID})
    _json(folder, "special_tokens_map.json", {
        "bos_token": token("<s>"), "eos_token": token("</s>"), "pad_token": token("<pad>"), "unk_token": token("<unk>")})
    _json(folder, "tokenizer_config.json", {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": None,
        "added_tokens_decoder": {str(i): {**token(t), "special": True} for i, t in added.items()},
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "extra_special_tokens": {"image_token": "<image>"},
        "image_token": "<image>",
        "legacy": False,
        "model_max_length": 512,
        "pad_token": "<pad>",
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    })
    # The same tokenizer in the newer form. From tokenizer.model alone, transformers 5's AutoTokenizer (unlike its LlamaTokenizer)
    # leaves the leading "\u2581" of a text out.
    with tempfile.TemporaryDirectory() as scratch:
        LlamaTokenizer.from_pretrained(folder).save_pretrained(scratch)
        shutil.copyfile(os.path.join(scratch, "tokenizer.json"), os.path.join(folder, "tokenizer.json"))
    _json(folder, "preprocessor_config.json", {
        "crop_size": {"height": draw.SIZE, "width": draw.SIZE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": CLIP_MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": CLIP_STD,
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": draw.SIZE},
    })
    _json(folder, "processor_config.json", {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": PATCH,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    })


# ---- data ------------------------------------------------------------------


def load_train(data):
    """Pictures of train/ with what its questions tell: [(shape, color)] or None."""
    with open(os.path.join(data, "train", "questions.json")) as f:
        questions = json.load(f)
    count = 1 + max(q[2] for q in questions)
    shape, color = [None] * count, [None] * count
    for question, answer, i in questions:
        if answer in draw.SHAPES:
            shape[i] = answer
        elif answer in draw.COLORS:
            color[i] = answer
        for c in draw.COLOR_NAMES:  # "what is the red shape?"
            if question == f"what is the {c} shape?":
                color[i] = c
        for s in draw.SHAPES:  # "what color is the circle?"
            if question in (f"what color is the {s}?", f"what is the color of the {s}?"):
                shape[i] = s
        for c in draw.COLOR_NAMES:
            if question in [t.format(x=c + " shape") for t in draw.PRESENT] and answer == "yes":
                color[i] = c
            if question in [t.format(x=c + " shape") for t in draw.ABSENT] and answer == "no":
                color[i] = c
        for s in draw.SHAPES:
            if question in [t.format(x=s) for t in draw.PRESENT] and answer == "yes":
                shape[i] = s
            if question in [t.format(x=s) for t in draw.ABSENT] and answer == "no":
                shape[i] = s
    images = np.stack([np.asarray(Image.open(os.path.join(data, "train", "images", f"{i}.png")).convert("RGB"))
                       for i in range(count)])
    facts = [[(s, c)] if s and c else None for s, c in zip(shape, color)]
    return images, facts, questions


def patch_counts(mask):
    """How many pixels of each 8 x 8 patch a mask covers, [64]."""
    return mask.reshape(GRID, PATCH, GRID, PATCH).sum((1, 3)).reshape(-1)


def patch_labels(counts, facts):
    """Per patch: class of shape and colour; 0 is background, -100 not asked."""
    shape = np.zeros(IMAGE_TOKENS, np.int64)
    color = np.zeros(IMAGE_TOKENS, np.int64)
    for covered, (s, c) in zip(counts, facts):
        enough = covered >= min(6, covered.max())
        partly = (covered > 0) & ~enough
        shape[enough], color[enough] = 1 + draw.SHAPES.index(s), 1 + draw.COLOR_NAMES.index(c)
        shape[partly] = color[partly] = -100
    return shape, color


class Pool:
    """Pictures, facts and patch labels in memory."""

    def __init__(self):
        self.images, self.facts, self.shape, self.color = [], [], [], []

    def add(self, image, facts, counts):
        s, c = patch_labels(counts, facts)
        self.images.append(image), self.facts.append(facts), self.shape.append(s), self.color.append(c)

    def freeze(self):
        self.images = np.stack(self.images)
        self.shape, self.color = np.stack(self.shape), np.stack(self.color)
        return self


def drawn_pool(count, seed):
    rng, pool = random.Random(seed), Pool()
    for _ in range(count):
        picture, shapes, masks = draw.draw_picture(rng)
        pool.add(np.asarray(picture), [(s.shape, s.color) for s in shapes], [patch_counts(m > 100) for m in masks])
    return pool.freeze()


def real_pool(images, facts, ids):
    pool = Pool()
    for i in ids:
        if facts[i] is None:
            continue
        image = images[i].astype(np.int32)
        corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
        background = np.median(corners, axis=0)
        mask = np.abs(image - background).sum(-1) > 60
        pool.add(images[i], facts[i], [patch_counts(mask)])
    return pool.freeze()


_MEAN = torch.tensor(CLIP_MEAN).view(1, 3, 1, 1)
_STD = torch.tensor(CLIP_STD).view(1, 3, 1, 1)


def to_pixels(images):
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    return ((x / 255 - _MEAN) / _STD).contiguous()


class Batches:
    """Half real, half drawn pictures, mirrored at random."""

    def __init__(self, real, drawn, rng, real_share):
        self.real, self.drawn, self.rng, self.real_share = real, drawn, rng, real_share

    def keep_features(self, features):
        """Runs the tower once over every picture and its mirror image; pick_features then reads."""
        for pool in (self.real, self.drawn):
            pool.features = []
            for images in (pool.images, pool.images[:, :, ::-1]):
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    parts = [features(to_pixels(images[i:i + 64])).to(torch.bfloat16)
                             for i in range(0, len(images), 64)]
                pool.features.append(torch.cat(parts))

    def pick_features(self, size):
        found, facts, shape, color = [], [], [], []
        for _ in range(size):
            pool = self.real if self.rng.random() < self.real_share else self.drawn
            i, mirrored = self.rng.randrange(len(pool.features[0])), self.rng.randrange(2)
            found.append(pool.features[mirrored][i])
            facts.append(pool.facts[i][::-1] if mirrored else pool.facts[i])
            s, c = pool.shape[i], pool.color[i]
            if mirrored:
                s, c = (a.reshape(GRID, GRID)[:, ::-1].reshape(-1) for a in (s, c))
            shape.append(s), color.append(c)
        return torch.stack(found), facts, torch.from_numpy(np.stack(shape)), torch.from_numpy(np.stack(color))

    def pick(self, size):
        images, facts, shape, color = [], [], [], []
        for _ in range(size):
            pool = self.real if self.rng.random() < self.real_share else self.drawn
            i = self.rng.randrange(len(pool.facts))
            image, f, s, c = pool.images[i], pool.facts[i], pool.shape[i], pool.color[i]
            if self.rng.random() < 0.5:
                image, f = image[:, ::-1], f[::-1]
                s, c = (a.reshape(GRID, GRID)[:, ::-1].reshape(-1) for a in (s, c))
            images.append(image), facts.append(f), shape.append(s), color.append(c)
        return to_pixels(np.stack(images)), facts, torch.from_numpy(np.stack(shape)), torch.from_numpy(np.stack(color))


class Packer:
    """One sequence per picture: its tokens once, then several questions.

    Every question sees the picture and itself, not its neighbours, and counts
    positions from the end of the picture: the same arithmetic as one prompt
    per question, at a third of the cost.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.cache = tokenizer, {}
        ids = tokenizer.encode(TEMPLATE.format("x"))
        self.prefix = ids[:ids.index(IMAGE_ID)] + [IMAGE_ID] * IMAGE_TOKENS

    def segment(self, question, answer):
        key = (question, answer)
        if key not in self.cache:
            prompt = self.tokenizer.encode(TEMPLATE.format(question))
            full = self.tokenizer.encode(TEMPLATE.format(question) + " " + answer) + [2]
            assert full[:len(prompt)] == prompt
            start = prompt.index(IMAGE_ID) + 1
            self.cache[key] = (full[start:], len(prompt) - start)
        return self.cache[key]

    def word(self, answer):
        """The id of an answer of one token."""
        tokens, prompt = self.segment("x", answer)
        assert len(tokens) == prompt + 2
        return tokens[prompt]

    def pack(self, all_questions):
        rows = []
        for questions in all_questions:
            ids, pos, seg, labels = list(self.prefix), list(range(len(self.prefix))), [0] * len(self.prefix), \
                [-100] * len(self.prefix)
            for k, qa in enumerate(questions):
                tokens, prompt = self.segment(*qa)
                ids += tokens
                pos += range(len(self.prefix), len(self.prefix) + len(tokens))
                seg += [k + 1] * len(tokens)
                labels += [-100] * prompt + tokens[prompt:]
            rows.append((ids, pos, seg, labels))
        length = max(len(r[0]) for r in rows)
        length = (length + 15) // 16 * 16

        def padded(i, fill):
            return torch.tensor([r[i] + [fill] * (length - len(r[i])) for r in rows])

        ids, pos, seg, labels = padded(0, PAD_ID), padded(1, 0), padded(2, -1), padded(3, -100)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        see = (seg[:, None, :] == seg[:, :, None]) | (seg[:, None, :] == 0)
        return ids, pos, (see & causal)[:, None], labels


def tower_features(tower):
    """Patch features as LLaVA takes them: the last layer but one, CLS dropped."""
    return lambda pixels: tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


class Forward:
    """LlavaForConditionalGeneration's forward in three calls, so that they can be compiled."""

    def __init__(self, model, compiled=False):
        self.model, inner = model, model.model
        self.features = tower_features(inner.vision_tower)
        self.decode = lambda x, mask, pos: inner.language_model(
            inputs_embeds=x, attention_mask=mask, position_ids=pos, use_cache=False).last_hidden_state
        if compiled:
            self.features = torch.compile(self.features, dynamic=False)
            self.decode = torch.compile(self.decode, dynamic=True)

    def __call__(self, features, packed):
        """Loss of the answers' tokens, and all logits."""
        ids, pos, see, labels = packed
        inner = self.model.model
        self.image = image = inner.multi_modal_projector(features)
        start = int((ids[0] == IMAGE_ID).nonzero()[0])  # the same for all rows
        text = inner.language_model.embed_tokens(ids)
        x = torch.cat([text[:, :start], image.to(text.dtype), text[:, start + IMAGE_TOKENS:]], 1)
        mask = torch.zeros(see.shape).masked_fill(~see, -1e9)
        logits = self.model.lm_head(self.decode(x, mask, pos))
        target = labels[:, 1:].reshape(-1)
        keep = target != -100
        return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1])[keep].float(), target[keep]), logits

    def word_loss(self, labels, ids):
        """Covered patches, projected, shall point where the embeddings of their words point."""
        on = labels > 0
        words = F.normalize(self.model.model.language_model.embed_tokens.weight[ids], dim=-1)
        near = F.normalize(self.image[on].float(), dim=-1) @ words.T
        return F.cross_entropy(10 * near, labels[on] - 1)

    @staticmethod
    def question_loss(logits, packed):
        """Loss of the questions' own tokens (those of the template included)."""
        ids, pos, _, labels = packed
        ask = (ids != PAD_ID) & (labels == -100) & (pos > IMAGE_TOKENS + 4)
        keep = ask[:, 1:].reshape(-1)
        return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1])[keep].float(), ids[:, 1:].reshape(-1)[keep])


def schedule(step, progress, warmup):
    return min(1, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, progress))))


def held_out_accuracy(forward, packer, images, questions, ids):
    """Teacher-forced: right when every answer token and </s> would be chosen."""
    by = {i: [] for i in ids}
    for q, a, i in questions:
        if i in by:
            by[i].append((q, a))
    right = total = 0
    with torch.no_grad():
        for k in range(0, len(ids), 40):
            chunk = ids[k:k + 40]
            packed = packer.pack([by[i] for i in chunk])
            _, logits = forward(forward.features(to_pixels(images[chunk])), packed)
            labels, seg_ok = packed[3], (logits[:, :-1].argmax(-1) == packed[3][:, 1:]) | (packed[3][:, 1:] == -100)
            for r, i in enumerate(chunk):
                at = len(packer.prefix)
                for qa in by[i]:
                    n = len(packer.segment(*qa)[0])
                    right += bool(seg_ok[r, at - 1:at - 1 + n].all())
                    total += 1
                    at += n
    return right / total


def init_decoder(model):
    """The usual 0.02 suits wide models; at 128 wide, attention would begin flat and stay so for long."""
    for name, p in list(model.model.language_model.named_parameters()) + \
            list(model.model.multi_modal_projector.named_parameters()):
        if p.dim() < 2:
            continue
        std = 0.3 if "embed_tokens" in name else 0.03 if "o_proj" in name or "down_proj" in name else 0.088
        torch.nn.init.normal_(p, std=std)


def run(args):
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    os.makedirs(args.work, exist_ok=True)
    tokenizer_model = make_tokenizer(args.work)
    packer = Packer(Tokenizer(tokenizer_model))
    model = LlavaForConditionalGeneration(make_config())
    init_decoder(model)
    if args.compile:
        model.set_attn_implementation("eager")
    print("parameters", sum(p.numel() for p in model.parameters()), flush=True)
    if args.init_only:
        save_checkpoint(model, model.state_dict(), tokenizer_model, args.out)
        return
    images, facts, questions = load_train(args.data)
    split = len(images) - HELD_OUT
    held = list(range(split, len(images)))
    real = real_pool(images, facts, range(split))
    drawn = drawn_pool(args.drawn, args.seed + 1)
    batches = Batches(real, drawn, rng, 0.5)
    print("real", len(real.facts), "of", split, "drawn", len(drawn.facts), flush=True)
    tower = model.model.vision_tower
    started = time.time()

    # stage 1: the tower alone
    first = os.path.join(args.work, "tower.pt")
    if args.resume and os.path.exists(first):
        tower.load_state_dict(torch.load(first))
    else:
        features = Forward(model, args.compile).features
        heads = torch.nn.ModuleList([torch.nn.Linear(128, 1 + len(draw.SHAPES)), torch.nn.Linear(128, 1 + len(draw.COLORS))])
        params = list(tower.parameters()) + list(heads.parameters())
        opt = torch.optim.AdamW(params, lr=1, weight_decay=0.01, betas=(0.9, 0.98))
        for step in range(args.tower_steps):
            for g in opt.param_groups:
                g["lr"] = args.tower_lr * schedule(step, step / args.tower_steps, 200)
            pixels, _, shape, color = batches.pick(64)
            with torch.autocast("cpu", torch.bfloat16):
                x = features(pixels)
                x = F.layer_norm(x.float(), (128,))
                ls, lc = heads[0](x).float(), heads[1](x).float()
            loss_s = F.cross_entropy(ls.reshape(-1, ls.shape[-1]), shape.reshape(-1), ignore_index=-100)
            loss_c = F.cross_entropy(lc.reshape(-1, lc.shape[-1]), color.reshape(-1), ignore_index=-100)
            # the background is most of a picture: ask for the covered patches again
            on = shape.reshape(-1) > 0
            loss = loss_s + loss_c + F.cross_entropy(ls.reshape(-1, ls.shape[-1])[on], shape.reshape(-1)[on]) \
                + F.cross_entropy(lc.reshape(-1, lc.shape[-1])[on], color.reshape(-1)[on])
            opt.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            opt.step()
            if step % 100 == 0:
                hit_s = (ls.argmax(-1).reshape(-1) == shape.reshape(-1))[on].float().mean()
                hit_c = (lc.argmax(-1).reshape(-1) == color.reshape(-1))[on].float().mean()
                print(f"tower {step} loss {loss:.4f} shape {hit_s:.3f} color {hit_c:.3f} {time.time() - started:.0f} s",
                      flush=True)
        torch.save(tower.state_dict(), first)

    # stage 2: projector and decoder; the tower stays as it is, so it runs once per picture
    in_tower = {id(p) for p in tower.parameters()}
    groups = [{"params": [p for p in model.parameters() if id(p) not in in_tower], "base": args.lr}]
    opt = torch.optim.AdamW(groups, lr=1, weight_decay=0.01, betas=(0.9, 0.98))
    average = {k: v.clone() for k, v in model.state_dict().items()}
    second = os.path.join(args.work, "state.pt")
    begin = 0
    if args.resume and os.path.exists(second):
        saved = torch.load(second)
        model.load_state_dict(saved["model"]), saved["opt"] and opt.load_state_dict(saved["opt"])
        average, begin = saved["average"], saved["step"]
    twin = LlavaForConditionalGeneration(model.config)

    def report(step):
        twin.load_state_dict({k: v.to(torch.bfloat16).float() if v.is_floating_point() else v
                              for k, v in average.items()})
        accuracy = held_out_accuracy(Forward(twin), packer, images, questions, held)
        print(f"held out {step} {accuracy:.4f} {time.time() - started:.0f} s", flush=True)
        torch.save({"model": model.state_dict(), "opt": opt.state_dict(), "average": average, "step": step}, second)
        save_checkpoint(model, average, tokenizer_model, args.out)

    forward = Forward(model, args.compile)
    batches.keep_features(forward.features)
    print(f"features of all pictures {time.time() - started:.0f} s", flush=True)
    second_started, yes_no, negated = time.time(), 0.5, 0.04
    yes_no_ids, shape_ids, color_ids = (torch.tensor([packer.word(a) for a in words])
                                        for words in (["yes", "no"], draw.SHAPES, draw.COLOR_NAMES))
    for step in range(begin, args.steps):
        progress = (step + 1) / args.steps
        if args.minutes:
            progress = max(progress, (time.time() - second_started) / 60 / args.minutes)
        for g in opt.param_groups:
            g["lr"] = g["base"] * schedule(step, progress, 300)
        features, facts_of, shape, color = batches.pick_features(args.batch)
        # "is there not a" turns the answer round: with as many of them as of the others,
        # looking at the picture gains nothing at first, and learning stalls on "yes or no".
        # So they come when "is there a" is answered well, and half way at the latest.
        if yes_no > 0.88:
            negated = min(0.5, negated + 0.003)
        negated = max(negated, min(0.5, progress - 0.3))
        asked = []
        for f in facts_of:
            row = []
            for _ in range(args.questions):
                kind = "yesno" if yes_no < 0.88 and negated < 0.1 and rng.random() < 0.6 else None
                q, a = draw.ask(rng, f, kind, negated)
                row.append((draw.capitalize(q) if rng.random() < 0.3 else q, a))
            asked.append(row)
        with torch.autocast("cpu", torch.bfloat16):
            packed = packer.pack(asked)
            answer_loss, logits = forward(features, packed)
            # early on, also guess the questions' words: "is there a red" is likelier when red is
            # there, and a guess to compare with is what "yes or no" needs
            share = max(0.0, 0.5 - progress)
            loss = answer_loss
            if share:
                loss = loss + share * (forward.question_loss(logits, packed)
                                       + forward.word_loss(shape, shape_ids) + forward.word_loss(color, color_ids))
        opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(groups[0]["params"], 1.0)
        opt.step()
        with torch.no_grad():
            target = packed[3][:, 1:]
            asks = torch.isin(target, yes_no_ids)
            hit = (logits[:, :-1].argmax(-1) == target)[asks].float().mean().item()
            yes_no = 0.95 * yes_no + 0.05 * hit
        decay = min(0.998, (step + 1) / (step + 20))
        with torch.no_grad():
            for k, v in model.state_dict().items():
                if v.is_floating_point():
                    average[k].lerp_(v, 1 - decay)
        if step % 50 == 0:
            print(f"step {step} loss {answer_loss:.4f} yes/no {yes_no:.3f} negated {negated:.2f} {time.time() - started:.0f} s", flush=True)
        if step % 1000 == 999 or progress >= 1:
            report(step + 1)
        if progress >= 1:
            break


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="easy-VQA's data folder (train/ and test/)")
    parser.add_argument("--work", required=True, help="scratch folder: states, to go on after an interruption")
    parser.add_argument("--out", required=True, help="checkpoint folder to write")
    parser.add_argument("--tower-steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--minutes", type=float, help="end stage 2 after so long, learning rate included")
    parser.add_argument("--batch", type=int, default=16, help="pictures per step")
    parser.add_argument("--questions", type=int, default=8, help="questions per picture and step")
    parser.add_argument("--drawn", type=int, default=12000, help="pictures to draw")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--tower-lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="torch.compile: 1.6 times as fast, needs g++")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--init-only", action="store_true", help="write an untrained checkpoint and stop")
    run(parser.parse_args())


if __name__ == "__main__":
    main()

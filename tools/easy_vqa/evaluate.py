#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Asks a checkpoint questions about pictures, with transformers, in f32.

    # easy-VQA's test/, and the same with the pictures exchanged
    python evaluate.py --model CHECKPOINT --data EASY_VQA/test --answers out.txt
    python evaluate.py --model CHECKPOINT --data EASY_VQA/test --shuffle --answers out_shuffled.txt
    # the bundled pictures
    python evaluate.py --model CHECKPOINT --jsonl CHECKPOINT/questions.jsonl

The weights (bf16 in the file) are widened to f32 and all arithmetic is f32.
Greedy; an answer counts when it equals the right one. With --shuffle question
i's picture p is replaced by picture (p * 7919 + 13) mod N, N the number of
pictures; as N = 1000 and 7919 have no common factor, that is a permutation.

Answers are written one per line (.txt) or as a list (.json), in the order of
the questions. Prompt: `USER: <image>\\n{question} ASSISTANT:`, <image> standing
for 64 tokens, tokenized by transformers' LlamaTokenizer with <s> in front.
"""
import argparse
import collections
import json
import os

import numpy as np
import torch
from PIL import Image
from transformers import LlamaTokenizer, LlavaForConditionalGeneration

TEMPLATE = "USER: <image>\n{} ASSISTANT:"


def preprocess(picture, config):
    """CLIPImageProcessor for a picture that has the model's size already."""
    size = config["crop_size"]
    if picture.size != (size["width"], size["height"]):
        raise SystemExit(f"the picture is {picture.size}, the model takes {size}")
    x = np.asarray(picture.convert("RGB")).astype(np.float32) * np.float32(config["rescale_factor"])
    x = (x - np.array(config["image_mean"], np.float32)) / np.array(config["image_std"], np.float32)
    return torch.from_numpy(x.transpose(2, 0, 1).copy())


class Model:
    def __init__(self, folder):
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = LlamaTokenizer.from_pretrained(folder)
        self.image_id = self.model.config.image_token_index
        vision = self.model.config.vision_config
        self.image_tokens = (vision.image_size // vision.patch_size) ** 2
        with open(os.path.join(folder, "preprocessor_config.json")) as f:
            self.preprocessor = json.load(f)

    def prompt(self, question):
        ids = self.tokenizer(TEMPLATE.format(question)).input_ids
        at = ids.index(self.image_id)
        return ids[:at] + [self.image_id] * self.image_tokens + ids[at + 1:]

    def answers(self, asked, pictures, batch=128, max_tokens=16):
        """asked: [(question, picture index)]; pictures: {index: tensor}."""
        by_length = collections.defaultdict(list)
        for k, (question, _) in enumerate(asked):
            ids = self.prompt(question)
            by_length[len(ids)].append((k, ids))
        out = [None] * len(asked)
        for group in by_length.values():  # no padding: every row has the same length
            for i in range(0, len(group), batch):
                part = group[i:i + batch]
                ids = torch.tensor([p for _, p in part])
                pixels = torch.stack([pictures[asked[k][1]] for k, _ in part])
                with torch.no_grad():
                    new = self.model.generate(input_ids=ids, pixel_values=pixels, do_sample=False,
                                              attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens)
                for (k, _), row in zip(part, new[:, ids.shape[1]:].tolist()):
                    if 2 in row:
                        row = row[:row.index(2)]
                    out[k] = self.tokenizer.decode(row, skip_special_tokens=True).strip()
        return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--data", help="a folder with images/ and questions.json")
    parser.add_argument("--jsonl", help='a file of lines {"image", "question", "answer"}')
    parser.add_argument("--shuffle", action="store_true", help="exchange the pictures")
    parser.add_argument("--answers", help="write the answers here (.txt or .json)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if bool(args.data) == bool(args.jsonl):
        parser.error("one of --data and --jsonl")
    torch.set_num_threads(args.threads)
    if args.data:
        with open(os.path.join(args.data, "questions.json")) as f:
            rows = json.load(f)
        files = {i: os.path.join(args.data, "images", f"{i}.png") for i in {r[2] for r in rows}}
    else:
        with open(args.jsonl) as f:
            lines = [json.loads(line) for line in f]
        rows = [(r["question"], r["answer"], r["image"]) for r in lines]
        files = {r[2]: os.path.join(os.path.dirname(args.jsonl), r[2]) for r in rows}
    model = Model(args.model)
    pictures = {i: preprocess(Image.open(f), model.preprocessor) for i, f in files.items()}

    def shown(i):
        return (i * 7919 + 13) % len(pictures) if args.shuffle else i

    answers = model.answers([(q, shown(i)) for q, _, i in rows], pictures)
    right = sum(a == r[1] for a, r in zip(answers, rows))
    if len(rows) - right <= 40:
        for a, r in zip(answers, rows):
            if a != r[1]:
                print(f"{r[2]}: {r[0]} {r[1]!r}, answered {a!r}")
    print(f"{right} of {len(rows)} right: {100 * right / len(rows):.2f} %")
    if args.answers:
        with open(args.answers, "w") as f:
            if args.answers.endswith(".json"):
                json.dump(answers, f)
            else:
                f.write("".join(a.replace("\n", " ") + "\n" for a in answers))


if __name__ == "__main__":
    main()

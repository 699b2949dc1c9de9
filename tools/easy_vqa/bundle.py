#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws the bundled pictures and writes their questions.

Pictures and answers come from draw.py alone. The model only takes part in one
way: a picture whose questions it does not all answer rightly is not bundled
(these files are an installation test, not a measure of the model).

    python bundle.py --model CHECKPOINT        # writes CHECKPOINT/pictures, CHECKPOINT/questions.jsonl
"""
import argparse
import json
import os
import random

import torch

import draw
from evaluate import Model, preprocess


def questions_for(rng, facts):
    """Caption, shape, colour, and yes/no in both directions."""
    out = [(draw.CAPTION_QUESTION, draw.caption(facts))]
    if len(facts) == 1:
        shape, color = facts[0]
        out += [("What shape is in the image?", shape), ("what color is the shape?", color),
                (f"what is the {color} shape?", shape), (f"what color is the {shape}?", color)]
    else:
        for shape, color in facts:
            out.append((f"what is the {color} shape?", shape))
            if sum(s == shape for s, _ in facts) == 1:
                out.append((f"What color is the {shape}?", color))
    wanted = {"yes": 2, "no": 2}
    while any(wanted.values()):
        question, answer = draw.ask(rng, facts, "yesno")
        if wanted[answer] and question not in [q for q, _ in out]:
            wanted[answer] -= 1
            out.append((question, answer))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder; the files are written into it")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, rng = Model(args.model), random.Random(args.seed)
    folder = os.path.join(args.model, "pictures")
    os.makedirs(folder, exist_ok=True)
    lines, kept, tried = [], 0, 0
    while kept < 20:
        picture, shapes, _ = draw.draw_picture(rng, 1 if kept % 5 < 3 else 2)
        facts = [(s.shape, s.color) for s in shapes]
        asked = questions_for(rng, facts)
        if kept == 0 and facts != [("circle", "teal")]:
            continue  # the README's caption: "a teal circle"
        tried += 1
        answers = model.answers([(q, 0) for q, _ in asked], {0: preprocess(picture, model.preprocessor)})
        if answers != [a for _, a in asked]:
            continue
        name = f"pictures/{kept}.png"
        picture.save(os.path.join(args.model, name), optimize=True)
        lines += [json.dumps({"image": name, "question": q, "answer": a}) for q, a in asked]
        kept += 1
    with open(os.path.join(args.model, "questions.jsonl"), "w") as f:
        f.write("\n".join(lines) + "\n")
    print(f"{kept} pictures of {tried}, {len(lines)} questions")


if __name__ == "__main__":
    main()

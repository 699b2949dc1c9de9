#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws pictures of one or two shapes and writes questions about them.

The pictures look like those of easy-VQA (64 x 64, one flat-coloured shape on a
light background, soft edges) but none of them comes from it: everything about
a picture is drawn at random here, so colour, shape, size and position are
known, and so are the answers.

    python draw.py --out DIR --count 20 --seed 1     # a folder to look at
"""
import argparse
import json
import os
import random

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
SCALE = 2  # drawn larger, then averaged down: soft edges
SHAPES = ["circle", "rectangle", "triangle"]
COLORS = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
COLOR_NAMES = list(COLORS)
CAPTION_QUESTION = "Describe the image."


class Shape:
    """One shape: name, colour name, and its box in pixels of the picture."""

    def __init__(self, shape, color, box):
        self.shape, self.color, self.box = shape, color, box

    @property
    def center_x(self):
        return (self.box[0] + self.box[2]) / 2

    def describe(self):
        return {"shape": self.shape, "color": self.color, "box": list(self.box)}


def _random_box(rng, shape, two):
    """A box (x0, y0, x1, y1), in half pixels, inside the picture."""
    low, high = 10 if not two else 16, 64 if not two else 52
    if shape == "rectangle":
        w, h = rng.randint(low, high), rng.randint(low, high)
    elif shape == "circle":
        w = h = rng.randint(low, high)
    else:  # an upright triangle with equal sides
        w = rng.randint(max(low, 14), high)
        h = round(w * 0.866)
    x = rng.randint(0, SIZE * SCALE - w - 1)
    y = rng.randint(0, SIZE * SCALE - h - 1)
    return (x, y, x + w, y + h)


def _apart(a, b):
    gap = 4
    return a[2] + gap < b[0] or b[2] + gap < a[0] or a[3] + gap < b[1] or b[3] + gap < a[1]


def _paint(draw, shape, box, fill):
    x0, y0, x1, y1 = box
    if shape == "rectangle":
        draw.rectangle(box, fill=fill)
    elif shape == "circle":
        draw.ellipse(box, fill=fill)
    else:
        draw.polygon([(x0, y1), (x1, y1), ((x0 + x1) / 2, y0)], fill=fill)


def draw_picture(rng, count=None):
    """Returns (picture, shapes from left to right, coverage masks of the shapes)."""
    if count is None:
        count = 1 if rng.random() < 0.6 else 2
    background = tuple(rng.randint(228, 255) for _ in range(3))
    while True:
        boxes, shapes = [], []
        for _ in range(count):
            shape, color = rng.choice(SHAPES), rng.choice(COLOR_NAMES)
            box = _random_box(rng, shape, count == 2)
            boxes.append(box)
            shapes.append(Shape(shape, color, tuple(v / SCALE for v in box)))
        if count == 2:
            if not _apart(*boxes) or shapes[0].color == shapes[1].color:
                continue
            if abs(shapes[0].center_x - shapes[1].center_x) < 8:
                continue  # left and right must be plain
        break
    big = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), background)
    draw = ImageDraw.Draw(big)
    masks = []
    for shape, box in zip(shapes, boxes):
        _paint(draw, shape.shape, box, COLORS[shape.color])
        mask = Image.new("L", big.size, 0)
        _paint(ImageDraw.Draw(mask), shape.shape, box, 255)
        masks.append(np.asarray(mask.resize((SIZE, SIZE), Image.Resampling.BILINEAR)))
    picture = big.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    order = sorted(range(count), key=lambda i: shapes[i].center_x)
    return picture, [shapes[i] for i in order], [masks[i] for i in order]


# ---- questions -------------------------------------------------------------

# {x}: "a red shape" / "a circle" without its article
PRESENT = [
    "is there a {x}?",
    "is there a {x} in the image?",
    "is a {x} present?",
    "does the image contain a {x}?",
]
ABSENT = [
    "is there not a {x}?",
    "is there not a {x} in the image?",
    "is no {x} present?",
    "does the image not contain a {x}?",
]
ASK_COLOR = ["what color is the {s}?", "what is the color of the {s}?"]
ASK_SHAPE = ["what shape is in the image?", "what shape does the image contain?", "what shape is present?"]
ASK_SHAPE_OF = ["what is the {c} shape?"]
ASK_COUNT = ["how many shapes are there?", "how many shapes are in the image?"]


def caption(facts):
    """facts: [(shape, color)] from left to right."""
    return " and ".join(f"a {color} {shape}" for shape, color in facts)


def capitalize(question):
    return question[0].upper() + question[1:]


def ask(rng, facts, kind=None, negated=0.5):
    """One question with its answer; facts: [(shape, color)] from left to right.

    `negated` is the share of "is there not ..." among the yes/no questions.
    """
    if kind is None:
        kind = rng.choices(["yesno", "color", "shape", "count", "caption"], [65, 12, 12, 1, 10])[0]
    if kind == "caption":
        return CAPTION_QUESTION, caption(facts)
    if kind == "count":
        return rng.choice(ASK_COUNT), "one" if len(facts) == 1 else "two"
    if kind == "yesno":
        about_color, there = rng.random() < 0.5, rng.random() < 0.5
        have = [color if about_color else shape for shape, color in facts]
        every = COLOR_NAMES if about_color else SHAPES
        pool = sorted(set(have)) if there else [v for v in every if v not in have]
        x = rng.choice(pool) + (" shape" if about_color else "")
        if rng.random() >= negated:
            return rng.choice(PRESENT).format(x=x), "yes" if there else "no"
        return rng.choice(ABSENT).format(x=x), "no" if there else "yes"
    shape, color = rng.choice(facts)
    alone = len(facts) == 1
    if kind == "color":
        if alone:
            return rng.choice(ASK_COLOR).format(s=rng.choice([shape, "shape"])), color
        if sum(s == shape for s, _ in facts) == 1:
            return rng.choice(ASK_COLOR).format(s=shape), color
        return ask(rng, facts, "yesno", negated)
    if alone and rng.random() < 0.7:
        return rng.choice(ASK_SHAPE), shape
    return rng.choice(ASK_SHAPE_OF).format(c=color), shape


def all_questions():
    """Every question this file can ask, for the tokenizer."""
    things = SHAPES + [c + " shape" for c in COLOR_NAMES]
    out = [t.format(x=x) for t in PRESENT + ABSENT for x in things]
    out += [t.format(s=s) for t in ASK_COLOR for s in SHAPES + ["shape"]]
    out += ASK_SHAPE + ASK_COUNT + [t.format(c=c) for t in ASK_SHAPE_OF for c in COLOR_NAMES]
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    os.makedirs(args.out, exist_ok=True)
    with open(os.path.join(args.out, "facts.jsonl"), "w") as f:
        for i in range(args.count):
            picture, shapes, _ = draw_picture(rng)
            picture.save(os.path.join(args.out, f"{i}.png"))
            facts = [(s.shape, s.color) for s in shapes]
            line = {"image": f"{i}.png", "shapes": [s.describe() for s in shapes], "caption": caption(facts)}
            f.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

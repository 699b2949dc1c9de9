#!/usr/bin/env python3
"""Writes foreign_pictures.json beside this file: what Pillow makes of every picture of the shared assets' fuzz/ sets.

    python make_foreign_pictures.py ASSETS/fuzz        # Pillow 13.0.0

For each file: `size`, and of its convert("RGB") pixels an FNV-1a hash (`pixels`) or, for JPEG, whose decoders may round differently,
the rounded mean colours of 4 x 4 cells (`grid`, row by row); or `refused`, what Pillow says. Files of which other software recorded
the pixels (pngsuite/json) are judged by those and left out.
"""
import json
import pathlib
import sys
import warnings

import numpy
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
SETS = ("pngsuite", "torchvision_assets", "libjpeg-turbo")
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".webp", ".avif", ".heic"}


def fnv1a(data):
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) % 2**64
    return f"{value:016x}"


def describe(path):
    try:
        with Image.open(path) as image:
            image.load()
            rgb = numpy.array(image.convert("RGB"))
    except Exception as error:  # whatever Pillow's plugins throw
        return {"refused": str(error).replace(str(path), path.name)[:80]}
    height, width, _ = rgb.shape
    if path.suffix.lower() not in (".jpg", ".jpeg", ".avif", ".heic", ".webp"):
        return {"size": [width, height], "pixels": fnv1a(rgb.tobytes())}
    rows, columns = ([i * n // 4 for i in range(5)] for n in (height, width))
    grid = [[round(float(x)) for x in rgb[rows[i]:rows[i + 1], columns[j]:columns[j + 1]].mean((0, 1))] for i in range(4) for j in range(4)]
    return {"size": [width, height], "grid": grid}


def main():
    root = pathlib.Path(sys.argv[1])
    warnings.simplefilter("ignore")
    out = {}
    for name in SETS:
        for path in sorted((root / name).rglob("*")):
            recorded = path.parent.parent / "json" / (path.stem + ".json")
            if path.suffix.lower() in PICTURES and not (path.suffix == ".png" and recorded.exists()):
                out[str(path.relative_to(root))] = describe(path)
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in out.items())
    (HERE / "foreign_pictures.json").write_text("{\n" + text + "\n}\n")
    print(len(out), "pictures,", sum("refused" in v for v in out.values()), "refused by Pillow")


if __name__ == "__main__":
    main()

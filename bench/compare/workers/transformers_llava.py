#!/usr/bin/env python3
"""The last logits of a LLaVA in f32 by transformers: FOLDER PICTURE.npy ([height, width, 3] of bytes, as large as the model takes) IDS LOGITS.npy.

IDS, separated by commas: the picture stands behind the first of them.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def main():
    folder, picture, ids, out = sys.argv[1:]
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    vision = config["vision_config"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    first, *others = map(int, ids.split(","))
    pixels = (np.load(picture).astype(np.float32) / 255 - MEAN) / DEVIATION
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[first, *[config["image_token_index"]] * patches, *others]]),
                       pixel_values=torch.from_numpy(pixels).float().permute(2, 0, 1)[None], logits_to_keep=1).logits
    np.save(out, logits[0, -1].numpy())


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""PyTorch: CLIP's vision encoder of FOLDER without its last layer, transformers' code in bf16, compiled and frozen unless --eager."""

import argparse
import sys
import time

import numpy as np
import torch
from transformers import CLIPVisionModel

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from protocol import serve  # noqa: E402


class Features(torch.nn.Module):
    def __init__(self, folder):
        super().__init__()
        model = CLIPVisionModel.from_pretrained(folder, dtype=torch.bfloat16)
        self.vision = getattr(model, "vision_model", model)
        self.vision.encoder.layers = self.vision.encoder.layers[:-1]

    def forward(self, pixels):
        x = self.vision.pre_layrnorm(self.vision.embeddings(pixels))
        for layer in self.vision.encoder.layers:
            x = layer(x, None)
            x = x[0] if isinstance(x, tuple) else x
        return x


def load(args):
    torch.set_num_threads(args.threads)
    import torch._inductor.config as inductor
    inductor.freezing = True
    model = Features(args.folder).eval()
    return model if args.eager else torch.compile(model)


def encode(model, request):
    pixels = torch.from_numpy(np.load(request["pixels"])).bfloat16()
    with torch.no_grad():
        start = time.perf_counter()
        features = model(pixels)
        seconds = time.perf_counter() - start
    if "features" in request:
        np.save(request["features"], features[0].float().numpy())
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args()
    serve(lambda: load(args), {"encode": encode})


if __name__ == "__main__":
    main()

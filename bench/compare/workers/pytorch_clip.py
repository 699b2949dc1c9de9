#!/usr/bin/env python3
"""PyTorch: CLIP's vision encoder of FOLDER without its last layer, --format bf16|int8, compiled and frozen unless --eager.

int8: its linear layers as torch_int8.py has them, all else in bf16.
"""

import argparse
import sys

import torch

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from clip_features import Features  # noqa: E402
from protocol import encode, serve  # noqa: E402
from torch_int8 import Int8  # noqa: E402


def in_bytes(model):
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]:
        parent, _, last = name.rpartition(".")
        positions = model.vision.embeddings.num_positions
        setattr(model.get_submodule(parent), last, Int8(linear.weight.data, positions, linear.bias.data.float()))


def load(args):
    torch.set_num_threads(args.threads)
    import torch._inductor.config as inductor
    inductor.freezing = True
    model = Features(args.folder, torch.bfloat16).eval()
    if args.format == "int8":
        in_bytes(model)
    return model if args.eager else torch.compile(model)


def encode_picture(model, request):
    with torch.no_grad():
        return encode(request, lambda pixels: torch.from_numpy(pixels).bfloat16(), model, lambda features: features[0].float().numpy())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--format", choices=["bf16", "int8"], default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args()
    serve(lambda: load(args), {"encode": encode_picture})


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Makes tests/golden/blocks.safetensors with the PyPI package `gguf` (ggml project): values, and the blocks of q8 and q4 made of them.

    python make_block_goldens.py [--out FILE]

values [n, 32] f32 · Q8_0 [n, 34] u8 · Q4_0 [n, 18] u8
"""
import argparse
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q
from safetensors.numpy import save_file

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "blocks.safetensors")
rng = np.random.default_rng(8)

blocks = [np.zeros(32), np.full(32, 3.0), np.full(32, -3.0)]
for scale in [1e-30, 1e-8, 1e-5, 1e-3, 0.02, 1.0, 50.0, 1e4, 1e6]:
    blocks += [rng.standard_normal(32) * scale for _ in range(4)]
blocks.append(np.arange(-16, 16) / 2)                    # halves of steps of q4: extreme -8, step 1
blocks.append(np.arange(16, -16, -1) / 2)                # the same with a positive extreme
blocks.append(np.append(np.arange(31) - 15.5, 127.0))    # halves of steps of q8: step 1
blocks.append(np.append(np.arange(31) * 4 + 2.5, -127.0))
blocks.append(np.append(np.zeros(31), 1e-35))            # a step without an f16
both = np.full(32, 0.25)
both[[3, 17]] = [2.0, -2.0]                              # the first of two extremes decides
blocks += [both, -both]
values = np.stack(blocks).astype(np.float32)
save_file({"values": values, "Q8_0": gguf.quants.quantize(values, Q.Q8_0), "Q4_0": gguf.quants.quantize(values, Q.Q4_0)}, parser.parse_args().out)

#!/usr/bin/env python3
"""Makes tests/golden/pytorch, native and adapters: torch.save files, LLaVA's own layout, PEFT adapters. All seeded and tiny: two runs write the same bytes.

    python make_hf_goldens.py [--out DIR] [--only pytorch,native,adapters]

Needs the goldens of make_goldens.py beside it, and for `adapters` the package peft. README.md says what is in each file.
"""
import argparse
import collections
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file

from make_goldens import save, write_json

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent


# ------------------------------------------------------------------------------------------------- torch.save
def torch_save(value, path, **kw):
    torch.save(value, path, **kw)
    Path(path).chmod(0o644)


def make_pytorch(out):
    d = out / "pytorch"
    shutil.rmtree(d, ignore_errors=True)
    d.mkdir(parents=True)
    base = torch.arange(24.0).reshape(4, 6)
    cube = torch.arange(60.0).reshape(3, 4, 5)
    layouts = collections.OrderedDict(
        plain=base, transposed=base.t(), part=base[1:3, 2:5], row=base[2], column=base[:, 3], step=torch.arange(20.0)[1::3], permuted=cube.permute(2, 0, 1),
        tied=base.t(), one=torch.tensor(2.5), none=torch.zeros(0, 3), wide=torch.ones(1, 3).as_strided((1, 3), (77, 1)),
        parameter=torch.nn.Parameter(torch.linspace(-1, 1, 5)))
    torch_save(layouts, d / "layouts.bin")
    dtypes = dict(f64=torch.tensor([1.5, -2.25], dtype=torch.float64), f32=torch.tensor([1.5, -2.25]), f16=torch.tensor([1.5, -2.25]).half(),
                  bf16=torch.tensor([1.5, -2.25]).bfloat16(), i64=torch.tensor([-3, 1 << 40]), i32=torch.tensor([-3, 1 << 20], dtype=torch.int32),
                  i16=torch.tensor([-3, 300], dtype=torch.int16), i8=torch.tensor([-3, 100], dtype=torch.int8), u8=torch.tensor([3, 200], dtype=torch.uint8),
                  boolean=torch.tensor([True, False]))
    torch_save(dtypes, d / "dtypes.bin", pickle_protocol=4)
    torch_save({**dtypes, "epoch": 3, "rate": 0.5, "note": "x", "flag": True, "nothing": None, "list": [1, 2], "pair": (1, 2, 3, 4)}, d / "dtypes_p2.bin")
    module = torch.nn.Sequential(collections.OrderedDict(linear=torch.nn.Linear(3, 2), norm=torch.nn.LayerNorm(2)))
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(torch.arange(float(p.numel())).reshape(p.shape) + 10 * i)
    torch_save(module.state_dict(), d / "module.bin")  # with _metadata, by BUILD
    save(d / "layouts.safetensors", layouts)
    save(d / "dtypes.safetensors", dtypes)
    save(d / "module.safetensors", module.state_dict())
    # What must be refused.
    torch_save(base, d / "bare_tensor.bin")
    torch_save(module, d / "whole_module.bin")
    torch_save({"state": module.state_dict(), "epoch": 3}, d / "nested.bin")
    torch_save({"w": torch.ones(1).expand(5)}, d / "expanded.bin")
    # A checkpoint in two shards: the weights of llama/gqa_llama3_tied_f16, whose golden it shares.
    source = out / "llama/gqa_llama3_tied_f16"
    shards = d / "shards"
    shards.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(source / name, shards / name)
    weights = load_file(source / "model.safetensors")
    names = sorted(weights)
    index = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2:])):
        file = f"pytorch_model-0000{i + 1}-of-00002.bin"
        torch_save(collections.OrderedDict((n, weights[n]) for n in part), shards / file)
        index.update({n: file for n in part})
    write_json(shards / "pytorch_model.bin.index.json", dict(metadata=dict(total_size=sum(w.nbytes for w in weights.values())), weight_map=index))
    return {p.name: p.stat().st_size for p in sorted(d.rglob("*.bin"))}


# ------------------------------------------------------------------------------------------------- main
def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, default=HERE)
    ap.add_argument("--only", default="pytorch")
    args = ap.parse_args()
    steps = dict(pytorch=make_pytorch)
    for name in args.only.split(","):
        print(name, json.dumps(steps[name](args.out)), flush=True)


if __name__ == "__main__":
    main()

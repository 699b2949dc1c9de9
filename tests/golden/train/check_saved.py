#!/usr/bin/env python3
"""Loads what save_pretrained wrote with transformers, and compares the logits in f32.

    python check_saved.py --test build/dev/tests/unit_models_save

The test program writes the directories. Of a checkpoint that was loaded and saved, transformers must compute the same bits as of
the original, find every tensor and miss none; of every directory, also of models made by from_config, the logits must be m2lm's up
to f32 rounding.
"""
import argparse
import os
import subprocess
import tempfile
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaForCausalLM, LlavaForConditionalGeneration, MistralForCausalLM

HERE = Path(__file__).resolve().parent
CLASSES = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM, "llava": LlavaForConditionalGeneration}
TOLERANCE = 2e-5  # of max|logits|: two f32 computations of small networks


def logits(directory, given, dtype):
    kind = CLASSES[AutoConfig.from_pretrained(directory).model_type]
    # Without an explicit dtype, config.json's is used: what save_pretrained writes there must be the tensors'.
    model, info = kind.from_pretrained(directory, attn_implementation="eager", output_loading_info=True, **({"dtype": dtype} if dtype else {}))
    stray = {k: v for k, v in info.items() if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    inputs = {"input_ids": given["input_ids"].long()[None]}
    if "pixel_values" in given:
        inputs["pixel_values"] = given["pixel_values"][None].to(model.dtype)
    with torch.no_grad():
        return model.eval()(**inputs, use_cache=False).logits[0], stray, model.dtype


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", type=Path, required=True, help="the program of tests/unit/models_save.cpp")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failures = 0
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([arguments.test.resolve(), "-tc=directories for transformers"], check=True, cwd=HERE.parents[2],
                       env={**os.environ, "M2LM_SAVED_DIR": out}, stdout=subprocess.DEVNULL)
        for file in sorted(Path(out).glob("*.safetensors")):
            name, given = file.stem, load_file(file)
            mine, stray, _ = logits(file.with_suffix(""), given, torch.float32)
            error = ((mine - given["logits"]).abs().max() / given["logits"].abs().max()).item()
            verdict = [f"m2lm {error:.1e}"]
            ok = error < TOLERANCE and not stray
            original = next((d for d in (HERE.parent / "llama" / name.split(".")[0], HERE.parent / "llava" / name) if d.is_dir()), None)
            if original:
                theirs, _, _ = logits(original, given, torch.float32)
                same = torch.equal(mine, theirs)
                _, _, as_saved = logits(file.with_suffix(""), given, None)
                _, _, as_original = logits(original, given, None)
                verdict.append(f"original {'identical' if same else 'DIFFERENT'}, dtype {as_saved}")
                ok = ok and same and as_saved == as_original
            print(f"{'ok  ' if ok else 'FAIL'} {name}: {', '.join(verdict)}{' ' + str(stray) if stray else ''}", flush=True)
            failures += not ok
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()

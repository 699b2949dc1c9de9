#!/usr/bin/env python3
"""What formats of weights cost in quality, ours beside llama.cpp's.

    DIR/bin/python bench/quality/quality.py --peers DIR --bin build/release/bin --story ../shared/assets/llama/stories15M-hf \\
        [--easy-vqa ../shared/assets/data/easy_vqa/test]

Texts: 2,000 tokens that stories15M wrote itself (8 of 250, sampled at temperature 1 by transformers in f32, seeds 0 … 7). At each position the
distribution of the next token is compared with that of f32 (transformers): mean Kullback-Leibler divergence in nats, and how often the most likely
token is the same. llama.cpp gets a GGUF of the same f32 weights through its own quantiser, with every matrix quantised (--pure). easy-VQA: share
of the test questions that the bundled model answers exactly.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
COMPARE = HERE.parent / "compare"
OURS = ["f32", "bf16", "q8", "w8a8", "q4", "q4_128"]
TEXTS, LENGTH = 8, 250


def texts_and_logits(folder):
    """ids [texts][length], logits [texts, length, vocabulary] in f32."""
    import torch
    from transformers import LlamaForCausalLM
    torch.set_num_threads(2)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, logits = [], []
    with torch.no_grad():
        for seed in range(TEXTS):
            torch.manual_seed(seed)
            text = model.generate(torch.tensor([[1]]), attention_mask=torch.ones(1, 1, dtype=torch.int64), pad_token_id=2, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=LENGTH - 1, min_new_tokens=LENGTH - 1)
            ids.append(text[0].tolist())
            logits.append(model(text).logits[0].numpy())
    return ids, np.stack(logits)


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def divergence(got, want):
    """Mean KL(want || got) in nats, its standard error, and the share of equal most likely tokens."""
    p, q = log_softmax(want), log_softmax(got)
    kl = (np.exp(p) * (p - q)).sum(-1).reshape(-1)
    return kl.mean(), kl.std() / len(kl) ** 0.5, (got.argmax(-1) == want.argmax(-1)).mean()


def ours(args, precision, ids, scratch):
    from safetensors.numpy import load_file
    out = []
    for text in ids:
        path = scratch / "dump.safetensors"
        subprocess.run([args.bin / "m2lm-bench", "--model", args.story, "--precision", precision, "-p", "8", "-n", "0", "-r", "1", "--dump", path,
                        "--ids", ",".join(map(str, text))], check=True, stdout=subprocess.DEVNULL)
        out.append(load_file(path)["logits"])
    return np.stack(out)


def llama(args, name, ids, scratch):
    worker = subprocess.Popen([args.peers / "llama/bin/python", COMPARE / "workers/llama_cpp.py", scratch / f"model-{name}.gguf", "--context", "256",
                               "--batch", "256"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    worker.stdout.readline()
    out = []
    for text in ids:
        path = scratch / "logits.npy"
        worker.stdin.write(json.dumps({"do": "all_logits", "ids": text, "logits": str(path)}) + "\n")
        worker.stdin.flush()
        if not worker.stdout.readline():
            sys.exit(f"llama.cpp ended with {worker.wait()}")
        out.append(np.load(path))
    worker.stdin.close()
    worker.wait()
    return np.stack(out)


def gguf(args, scratch):
    import shutil
    for name in ("config.json", "model.safetensors"):
        shutil.copy(args.story / name, scratch / name)
    quiet = dict(check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run([sys.executable, COMPARE / "convert.py", "gguf", scratch, "--f32", "--name", "model-f32.gguf"], **quiet)
    subprocess.run([args.peers / "llama/bin/python", COMPARE / "convert.py", "quantize", scratch, "--name", "model-f32.gguf"], **quiet)


def easy_vqa(args, precision, scratch):
    """Right answers, and questions."""
    rows = json.loads((args.easy_vqa / "questions.json").read_text())
    file = scratch / "questions.jsonl"
    file.write_text("".join(json.dumps({"question": q, "image": str((args.easy_vqa / "images" / f"{i}.png").resolve())}) + "\n" for q, _, i in rows))
    done = subprocess.run([args.bin / "m2lm-vqa", "--questions", file, "--precision", precision, "--json"], check=True, capture_output=True, text=True)
    answers = [json.loads(line)["answer"].strip() for line in done.stdout.splitlines()]
    return sum(a == row[1] for a, row in zip(answers, rows)), len(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=pathlib.Path, required=True)
    parser.add_argument("--bin", type=pathlib.Path, required=True, help="where m2lm-bench and m2lm-vqa are")
    parser.add_argument("--story", type=pathlib.Path, required=True, help="stories15M as a Hugging Face checkpoint")
    parser.add_argument("--easy-vqa", type=pathlib.Path)
    parser.add_argument("--precisions", nargs="+", choices=OURS, default=OURS)
    args = parser.parse_args()
    print(f"level: {os.environ.get('M2LM_MAX_ISA', 'as the machine has it')}")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        ids, want = texts_and_logits(args.story)
        gguf(args, scratch)

        def show(name, got, more=""):
            mean, error, same = divergence(got, want)
            print(f"{name:20} mean KL {mean:.6f} ± {error:.6f}   same token {same:7.2%}{more}", flush=True)

        for precision in args.precisions:
            more = ""
            if args.easy_vqa:
                right, questions = easy_vqa(args, precision, scratch)
                more = f"   easy-VQA {right} of {questions} ({right / questions:.2%})"
            show(f"m2lm {precision}", ours(args, precision, ids, scratch), more)
        for name in ("f32", "q8_0", "q4_0"):
            show(f"llama.cpp {name.upper()}", llama(args, name, ids, scratch))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes sampling.json: what transformers' logits processors make of random logits, and what Python decodes from damaged UTF-8.

    python make_sampling_golden.py            (torch and transformers as in ../requirements.txt)

Logits are multiples of 1/64, so they are exact in decimal. A case whose outcome hangs on the last bits of a softmax, or on the order
in which an unstable sort leaves equal logits, has no right answer and is drawn again. The constructed cases at the end are exact.
"""
import json
import pathlib
import random

import torch
from transformers import (LogitsProcessorList, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper,
                          TopKLogitsWarper, TopPLogitsWarper)

MARGIN = 1e-5


def processors(options):
    """In the order of transformers.generation.utils.GenerationMixin._get_logits_processor."""
    out = LogitsProcessorList()
    if "repetition_penalty" in options:
        out.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if "temperature" in options:
        out.append(TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        out.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        out.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        out.append(MinPLogitsWarper(options["min_p"]))
    return out


def ambiguous(processor, scores):
    if isinstance(processor, TopPLogitsWarper):
        ordered, order = torch.sort(scores, stable=True)
        tail = ordered.double().softmax(-1).cumsum(-1)
        if ((tail - (1 - processor.top_p)).abs() < MARGIN).any():
            return True
        remove = tail <= 1 - processor.top_p
        remove[..., -1] = False
        stable = scores.masked_fill(remove.scatter(1, order, remove), -torch.inf)
        return not torch.equal(stable, processor(None, scores))
    if isinstance(processor, MinPLogitsWarper):
        p = scores.double().softmax(-1)
        return bool(((p / p.max() / max(processor.min_p, MARGIN) - 1).abs() < MARGIN).any())
    return False


def run(logits, history, options, check=True):
    scores = torch.tensor([logits], dtype=torch.float32)
    for processor in processors(options):
        if check and ambiguous(processor, scores):
            return None
        scores = processor(torch.tensor([history], dtype=torch.long), scores)
    return scores[0].tolist()


def random_options(rng, which):
    make = {
        "repetition_penalty": lambda: rng.choice([0.5, 0.9, 1.1, 1.2, 1.3, 2.0]),
        "temperature": lambda: rng.choice([0.01, 0.2, 0.7, 0.8, 1.3, 5.0]),
        "top_k": lambda: rng.choice([1, 2, 3, 5, 10, 50]),
        "top_p": lambda: rng.choice([0.0, 0.05, 0.3, 0.5, 0.8, 0.9, 0.95, 0.999]),
        "min_p": lambda: rng.choice([0.01, 0.05, 0.1, 0.3, 0.9]),
    }
    return {name: make[name]() for name in which}


def bulk_logits(vocab, seed):
    """Made by the same formula in the test, so that a large vocabulary costs no bytes here."""
    return [((i * 7919 + seed * 104729 + (i * i) % 6007) % 10007 - 5000) / 512 for i in range(vocab)]


def main():
    rng = random.Random(20240229)
    names = ["repetition_penalty", "temperature", "top_k", "top_p", "min_p"]
    small, bulk = [], []
    plans = [[name] for name in names for _ in range(7)]
    plans += [sorted(rng.sample(names, rng.randint(2, 5)), key=names.index) for _ in range(30)]
    plans += [names] * 5
    for which in plans:
        while True:
            vocab = rng.choice([1, 2, 3, 5, 7, 8, 13, 16, 17, 24, 31])
            logits = [round(rng.gauss(0, rng.choice([0.5, 2, 6])) * 64) / 64 for _ in range(vocab)]
            if rng.random() < 0.2:
                for i in range(0, vocab - 1, 3):
                    logits[i] = float("-inf")
            history = [rng.randrange(vocab) for _ in range(rng.randint(1, 12))]
            options = random_options(rng, which)
            processed = run(logits, history, options)
            if processed is not None:
                break
        small.append((logits, history, options, processed))
    for n, p in [(10, 0.9), (10, 0.5), (4, 0.5), (4, 0.75), (4, 0.25), (8, 1.0), (2, 0.0)]:  # equal logits: exact limits, stable order
        small.append(([0.0] * n, [0], {"top_p": p}, run([0.0] * n, [0], {"top_p": p}, check=False)))
    ties = [1.0, 3.0, 3.0, 2.0, 3.0, 1.0]
    for options in ({"top_k": 1}, {"top_k": 2}, {"top_k": 4}, {"top_k": 5}, {"min_p": 1.0}):
        small.append((ties, [0], options, run(ties, [0], options, check=False)))
    signs = [0.0, -0.0, 1.5, -1.5, 2.0, -2.0]
    small.append((signs, [0, 1, 2, 3, 3, 3, 2], {"repetition_penalty": 1.25}, run(signs, [0, 1, 2, 3, 3, 3, 2], {"repetition_penalty": 1.25})))

    for seed, (vocab, options) in enumerate([
            (1000, {"top_p": 0.9}), (1000, {"temperature": 0.7, "top_k": 40, "top_p": 0.95}), (4001, {"top_k": 137}),
            (4001, {"temperature": 3.0, "top_p": 0.5}), (4001, {"min_p": 0.2}), (2048, {"temperature": 2.0, "top_k": 100, "top_p": 0.8, "min_p": 0.1})]):
        logits = bulk_logits(vocab, seed)
        processed = run(logits, [0], options)
        if processed is None:
            raise SystemExit(f"bulk case {seed} is ambiguous: change its numbers")
        bulk.append(dict(vocab=vocab, seed=seed, options=options, kept=[i for i, x in enumerate(processed) if x > float("-inf")]))

    utf8 = ["abc", "é", "日本語", "👍🏽", "a\u0000b"]
    raw = [t.encode() for t in utf8] + [bytes.fromhex(h) for h in (
        "80", "c3", "c328", "e28281c3", "e282", "e28241", "f09f91", "f09f9141", "f0908080", "f08f8080", "f48fbfbf", "f4908080", "c080", "c1bf",
        "eda080", "edbfbf", "ee8080", "e08080", "e0a080", "fe", "ff41", "f8888080", "61f1808062", "c3c3a9", "e2e282ac")]
    raw += [bytes(rng.choice([0x41, 0x80, 0xBF, 0xC2, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xED, 0xF4, 0x90]) for _ in range(16)) for _ in range(20)]

    def number(x):
        return "null" if x == float("-inf") else f"{x:.9g}"

    def numbers(xs):
        return "[" + ",".join(map(number, xs)) + "]"

    compact = dict(separators=(",", ":"))
    lines = [f'{{"options":{json.dumps(o, **compact)},"history":{json.dumps(h, **compact)},"logits":{numbers(l)},"processed":{numbers(p)}}}'
             for l, h, o, p in small]
    out = ['{"processors":[', ",\n".join(lines), '],\n"bulk":[', ",\n".join(json.dumps(b, **compact) for b in bulk), '],\n"utf8":[',
           ",\n".join(json.dumps(dict(bytes=b.hex(), text=b.decode(errors="replace").encode().hex()), **compact) for b in raw), "]}"]
    path = pathlib.Path(__file__).with_name("sampling.json")
    path.write_text("\n".join(out) + "\n")
    print(f"{path.name}: {path.stat().st_size} bytes, {len(small)} + {len(bulk)} + {len(raw)} cases")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""CTranslate2: FOLDER of a converted decoder. A prompt is taken as the static part of the answer, so that it is computed in one piece."""

import argparse
import sys
import time

import ctranslate2

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from protocol import serve  # noqa: E402


class State:
    def __init__(self, args):
        self.generator = ctranslate2.Generator(args.folder, device="cpu", compute_type="int8", inter_threads=1, intra_threads=args.threads)
        with open(f"{args.folder}/vocabulary.json") as file:
            import json
            self.words = json.load(file)

    def run(self, ids, n):
        start = time.perf_counter()
        self.generator.generate_batch([[self.words[i] for i in ids]], max_length=n, min_length=n, include_prompt_in_result=False, sampling_topk=1)
        return time.perf_counter() - start


def prefill(s, request):
    return s.run(request["ids"], 1)


def decode(s, request):
    """The time of n tokens less that of one."""
    return s.run(request["ids"], request["n"] + 1) - s.run(request["ids"], 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    serve(lambda: State(args), {"prefill": prefill, "decode": decode})


if __name__ == "__main__":
    main()

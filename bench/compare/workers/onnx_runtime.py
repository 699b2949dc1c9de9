#!/usr/bin/env python3
"""onnxruntime: FILE.onnx, a decoder with its keys and values as inputs and outputs, or with --clip a vision encoder (convert.py makes both)."""

import argparse
import sys
import time

import numpy as np
import onnxruntime as ort

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from protocol import encode, serve  # noqa: E402


class State:
    def __init__(self, args):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = args.threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        self.session = ort.InferenceSession(args.file, options, providers=["CPUExecutionProvider"])

    def run(self, ids, keys_and_values):
        """Logits of the last of ids, and the keys and values of everything so far."""
        inputs = {i.name: x for i, x in zip(self.session.get_inputs(), [np.array([ids], np.int64), *keys_and_values])}
        logits, *keys_and_values = self.session.run(None, inputs)
        return logits, keys_and_values

    def nothing(self):
        return [np.zeros([1, i.shape[1], 0, i.shape[3]], np.float32) for i in self.session.get_inputs()[1:]]


def prefill(s, request):
    start = time.perf_counter()
    logits, _ = s.run(request["ids"], s.nothing())
    seconds = time.perf_counter() - start
    if "logits" in request:
        np.save(request["logits"], logits.reshape(-1))
    return seconds


def decode(s, request):
    _, held = s.run(request["ids"], s.nothing())
    start = time.perf_counter()
    for step in range(request["n"]):
        logits, held = s.run([1 + step], held)
        logits.argmax()
    return time.perf_counter() - start


def encode_picture(s, request):
    name = s.session.get_inputs()[0].name
    return encode(request, lambda pixels: pixels, lambda pixels: s.session.run(None, {name: pixels})[0], lambda features: features[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    serve(lambda: State(args), {"prefill": prefill, "decode": decode, "encode": encode_picture})


if __name__ == "__main__":
    main()

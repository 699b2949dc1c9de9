#!/usr/bin/env python3
"""onnxruntime: FILE.onnx of a vision encoder (convert.py onnx-clip)."""

import argparse
import sys

import onnxruntime as ort

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from protocol import encode, serve  # noqa: E402


def load(args):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = args.threads, 1
    return ort.InferenceSession(args.file, options, providers=["CPUExecutionProvider"])


def encode_picture(session, request):
    name = session.get_inputs()[0].name
    return encode(request, lambda pixels: pixels, lambda pixels: session.run(None, {name: pixels})[0], lambda features: features[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    serve(lambda: load(args), {"encode": encode_picture})


if __name__ == "__main__":
    main()

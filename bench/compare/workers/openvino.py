#!/usr/bin/env python3
"""OpenVINO: FOLDER (a stateful decoder, or with --clip a vision encoder) [--group 32] [--hint bf16]."""

import argparse
import sys
import time

# This file has the name of the package.
sys.path.pop(0)
import numpy as np  # noqa: E402
import openvino as ov  # noqa: E402
import openvino.opset13 as op  # noqa: E402

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from protocol import encode, serve  # noqa: E402


def only_last_logits(model):
    """As OpenVINO GenAI does: the head sees the last position alone."""
    head = model.output("logits").get_node().input_value(0).get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    c = lambda v: op.constant(np.array([v], np.int64))
    hidden = head.input(0).get_source_output()
    sliced = op.slice(hidden, c(-1), c(np.iinfo(np.int64).max), c(1), c(1))
    head.input(0).replace_source_output(sliced.output(0))
    model.validate_nodes_and_infer_types()


class State:
    def __init__(self, args):
        core = ov.Core()
        model = core.read_model(f"{args.folder}/openvino_model.xml")
        if not args.clip:
            only_last_logits(model)
        settings = {"INFERENCE_PRECISION_HINT": args.hint, "INFERENCE_NUM_THREADS": args.threads, "PERFORMANCE_HINT": "LATENCY"}
        if args.group is not None:
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = args.group
        if args.kv:
            settings["KV_CACHE_PRECISION"] = args.kv
        self.compiled = core.compile_model(model, "CPU", settings)
        self.request = self.compiled.create_infer_request()
        self.length = 0

    def run(self, ids, mask, positions):
        r = self.request
        inputs = {"input_ids": ids, "attention_mask": mask, "beam_idx": np.arange(len(ids), dtype=np.int32), "position_ids": positions}
        names = {n for i in self.compiled.inputs for n in i.names}
        r.infer({k: v for k, v in inputs.items() if k in names}, share_inputs=True)
        return r.get_tensor("logits").data

    def prompts(self, prompts):
        """From nothing. Shorter prompts are padded at the left."""
        self.request.reset_state()
        n = max(map(len, prompts))
        ids = np.array([[0] * (n - len(p)) + list(p) for p in prompts], dtype=np.int64)
        mask = np.array([[0] * (n - len(p)) + [1] * len(p) for p in prompts], dtype=np.int64)
        self.mask = mask
        return self.run(ids, mask, np.maximum(mask.cumsum(1) - 1, 0))


def prefill(s, request):
    start = time.perf_counter()
    logits = s.prompts([request["ids"]])
    seconds = time.perf_counter() - start
    if "logits" in request:
        np.save(request["logits"], logits[0, -1].astype(np.float32))
    return seconds


def batch(s, request):
    prompts, n = request["prompts"], request["n"]
    s.prompts(prompts)
    count = np.array([[len(p)] for p in prompts], dtype=np.int64)
    mask = np.pad(s.mask, ((0, 0), (0, n)), constant_values=1)
    start = time.perf_counter()
    for step in range(n):
        ids = np.full((len(prompts), 1), 1 + step, dtype=np.int64)
        logits = s.run(ids, mask[:, :s.mask.shape[1] + step + 1], count + step)
        logits[:, -1].argmax(-1)
    return time.perf_counter() - start


def decode(s, request):
    return batch(s, {"prompts": [request["ids"]], "n": request["n"]})


def encode_picture(s, request):
    def run(pixels):
        s.request.infer([pixels], share_inputs=True)
        return s.request.get_output_tensor(0).data

    return encode(request, lambda pixels: pixels, run, lambda data: data[0].astype(np.float32))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hint", default="bf16")
    parser.add_argument("--group", type=int)
    parser.add_argument("--kv", default="")
    parser.add_argument("--clip", action="store_true")
    args = parser.parse_args()
    serve(lambda: State(args), {"prefill": prefill, "decode": decode, "batch": batch, "encode": encode_picture})


if __name__ == "__main__":
    main()

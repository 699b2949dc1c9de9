"""A worker holds one peer's model. It prints one line of JSON when it has loaded, then one for every line of JSON that it reads:

    {"do": "prefill", "ids": [...]}                    seconds until the logits of the last token are there; "logits": FILE writes them
    {"do": "decode", "ids": [...], "n": 128}           seconds of n further tokens behind ids, one by one, chosen greedily or given
    {"do": "batch", "prompts": [[...], ...], "n": 128} seconds of n steps of all sequences together
    {"do": "encode", "pixels": FILE}                   seconds of a vision encoder; "features": FILE writes what it computes

so that rounds of several programs can be taken in turns.
"""

import json
import os
import sys
import time

import numpy as np


def peak_memory():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def encode(request, prepare, run, features):
    """The job "encode": seconds of run(prepare(pixels)), of which features() makes an array of one row per position."""
    pixels = prepare(np.load(request["pixels"]))
    start = time.perf_counter()
    result = run(pixels)
    seconds = time.perf_counter() - start
    if "features" in request:
        np.save(request["features"], features(result))
    return seconds


def serve(load, jobs):
    """load() returns the state; jobs[name](state, request) returns seconds, or a dictionary with them."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints does not disturb the channel

    def say(answer):
        channel.write(json.dumps(answer) + "\n")
        channel.flush()

    start = time.perf_counter()
    state = load()
    say({"load_seconds": time.perf_counter() - start, "peak_memory_bytes": peak_memory()})
    for line in sys.stdin:
        request = json.loads(line)
        answer = jobs[request["do"]](state, request)
        answer = answer if isinstance(answer, dict) else {"seconds": answer}
        say({**answer, "peak_memory_bytes": peak_memory()})

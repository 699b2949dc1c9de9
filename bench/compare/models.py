"""Speed of whole models against llama.cpp, ik_llama.cpp, OpenVINO, PyTorch, CTranslate2 and onnxruntime.

Each program is a process of its own that waits for a line before every round, so that rounds are taken in turns and none spins while another
is timed. DIR is what install.sh and make_models.py made: DIR/{bin,llama,llama-avx2,ik}, DIR/models. What each computes for the same prompt is
compared with f32 before anything is timed. The bandwidth probe is taken before each round.

A round repeats what it times, the same number of times for all, until it takes the fastest program --least seconds: shorter rounds are noise. Before
each run memory is read, as m2lm-bench does by its probe, so that no program finds its weights in a cache of the processor.

--random draws the dims of a model (hidden a multiple of 32 from 512 to 5120, any heads that divide it), a prompt of 77, 333 or 1500 and a context of 100
to 3000 from --seed, makes it in DIR/models/random-SEED where it does not lie there yet (up to 3 GB, for the time of making 6), and takes the rows 4-bit,
8-bit, bf16 and context with it.
"""

import json
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

import draws

HERE = pathlib.Path(__file__).resolve().parent
ROWS = ["4-bit", "4-bit-128", "8-bit", "bf16", "context", "batch", "clip", "picture", "load", "avx2", "no-amx"]
LENGTHS = [33, 77, 120, 200, 333, 410, 512, 700]
# Cosine similarity of logits to f32 that random weights leave, by bits; a wrong answer is nowhere near.
LEAST_COSINE = {"q4": 0.6, "q4_128": 0.5, "q8": 0.98, "w8a8": 0.9, "bf16": 0.99, "int4": 0.5, "int8": 0.9, "q4_0": 0.6, "q8_0": 0.98}


class Worker:
    """A peer: one JSON line for each JSON line."""

    def __init__(self, command, environment=None):
        self.process = subprocess.Popen([str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=dict(os.environ, **(environment or {})))
        self.ready = self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(map(str, self.process.args))} ended with {self.process.wait()}")
        return json.loads(line)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Ours(Worker):
    """m2lm-bench --interactive: each line names a test."""

    def ask(self, do, **_):
        self.process.stdin.write(do + "\n")
        self.process.stdin.flush()
        answer = self.read()
        return {**answer, **answer["results"][0]}


class Setup:
    def __init__(self, args):
        self.args, self.peers = args, args.peers
        self.model = args.model or args.peers / "models/llama-1.1b"
        self.clip = args.peers / "models/clip-l-336"
        self.python = args.peers / "bin/python"
        self.scratch = pathlib.Path(tempfile.mkdtemp(prefix="m2lm-compare-"))
        self.machine = None
        self.prompt = args.prompt
        self.references = {}
        self.memory = np.ones(1 << 25)  # 256 MiB, more than the caches hold

    # ---- programs -----------------------------------------------------------------------------------------------------------

    def ours(self, precision, *options, isa=None, model=None):
        command = [self.args.bench, "--model", model or self.model, "--precision", precision, "--threads", self.args.threads, "--interactive", *options]
        worker = Ours(command, {"M2LM_MAX_ISA": isa} if isa else None)
        self.machine = self.machine or worker.ready["machine"]
        return worker

    def llama(self, name, *options, build="llama"):
        return Worker([self.peers / build / "bin/python", HERE / "workers/llama_cpp.py", self.model / f"model-{name}.gguf", "--threads", self.args.threads,
                       *options])

    def openvino(self, name, *options, folder=None):
        return Worker([self.python, HERE / "workers/openvino.py", (folder or self.model) / f"ov-{name}", "--threads", self.args.threads, *options])

    def pytorch(self, format_, *options):
        return Worker([self.python, HERE / "workers/pytorch.py", self.model, "--format", format_, "--threads", self.args.threads, *options])

    def ctranslate2(self):
        return Worker([self.python, HERE / "workers/ctranslate.py", self.model / "ct2-int8", "--threads", self.args.threads])

    def onnx(self, name):
        return Worker([self.python, HERE / "workers/onnx_runtime.py", self.clip / f"onnx-{name}.onnx", "--threads", self.args.threads])

    def ik(self, name, repack):
        """repack: weights laid out anew at load (-rtr of its programs), which speeds decoding and slows prompts."""
        return Worker([self.peers / "ik/ik_llama", self.model / f"model-{name}.gguf", self.args.threads, 1024, 512, 1, 1, int(repack)])

    # ---- outputs before times -----------------------------------------------------------------------------------------------

    def ids(self, count):
        draw = random.Random(count)
        return [draw.randrange(3, 31999) for _ in range(count)]

    def check_ours(self, precision, isa=None):
        """m2lm's logits of its own prompt against f32's."""
        path = self.scratch / "ours.safetensors"
        subprocess.run([self.args.bench, "--model", self.model, "--precision", precision, "--threads", str(self.args.threads), "-p", "64", "-n", "0", "-r", "1",
                        "--dump", path], check=True, stdout=subprocess.DEVNULL, env=dict(os.environ, **({"M2LM_MAX_ISA": isa} if isa else {})))
        from safetensors.numpy import load_file
        dump = load_file(path)
        self.compare(f"m2lm {precision}", precision, dump["logits"][-1].reshape(-1), self.reference(dump["input_ids"].reshape(-1).tolist()))

    def check(self, name, format_, worker, ids):
        path = self.scratch / "logits.npy"
        worker.ask(do="prefill", ids=ids, logits=str(path))
        self.compare(name, format_, np.load(path), self.reference(ids))

    def reference(self, ids):
        key = tuple(ids)
        if key not in self.references:
            path = self.scratch / "f32.npy"
            worker = Worker([self.python, HERE / "workers/pytorch.py", self.model, "--format", "f32", "--eager", "--threads", self.args.threads,
                             "--context", len(ids) + 8])
            worker.ask(do="prefill", ids=ids, logits=str(path))
            worker.close()
            self.references[key] = np.load(path)
        return self.references[key]

    def compare(self, name, format_, got, want):
        cosine = float(got @ want / np.linalg.norm(got) / np.linalg.norm(want))
        print(f"    {name}: cosine of the last logits to f32 {cosine:.5f}, the same token: {got.argmax() == want.argmax()}", flush=True)
        if not cosine >= LEAST_COSINE[format_]:
            sys.exit(f"{name} computes something else than f32: cosine {cosine}")

    # ---- rounds -------------------------------------------------------------------------------------------------------------

    def rounds(self, row, candidates, unit):
        """candidates: {name: (peer?, function that returns seconds, tokens that it computes in them)}; prints medians of tokens per second or of
        milliseconds, and ratios to the best peer."""
        fastest = min(self.round(candidates, 1).values())
        if fastest < self.args.least:  # the first round also wakes what has slept
            fastest = min(fastest, *self.round(candidates, 1).values())
        repeats = draws.repeats(fastest, self.args.least)
        value = (lambda name, seconds: seconds * 1e3) if unit == "ms" else (lambda name, seconds: candidates[name][2] / seconds)
        values = {name: [] for name in candidates}
        for _ in range(self.args.rounds):
            for name, seconds in self.round(candidates, repeats).items():
                values[name].append(value(name, seconds))
        middle = {name: statistics.median(v) for name, v in values.items()}
        choose = min if unit == "ms" else max
        theirs = [name for name, candidate in candidates.items() if candidate[0]]
        best = choose(theirs, key=middle.get) if theirs else None
        for name, median in middle.items():
            peer = candidates[name][0]
            ratio = None if peer or not best else (middle[best] / median if unit == "ms" else median / middle[best])
            spread = (max(values[name]) - min(values[name])) / median
            text = f"  {ratio:5.2f}x {best}" if ratio else ""
            print(f"{row:34} {name:30} {median:10.2f} {unit} (spread {spread:4.0%}){text}", flush=True)
            if self.args.json:
                with open(self.args.json, "a") as file:
                    file.write(json.dumps({"row": row, "who": name, "peer": peer, "value": median, "unit": unit, "rounds": values[name], "repeats": repeats,
                                           "ratio": ratio, "best_peer": best, "machine": self.machine, "model": self.model.name}) + "\n")
        if repeats > 1:
            print(f"    {repeats} times in each round")

    def round(self, candidates, repeats):
        """Mean seconds of `repeats` runs, by name."""
        seconds = {}
        for name, (_, run, _) in candidates.items():
            time.sleep(0.3)
            runs = []
            for _ in range(repeats):
                self.memory.sum()
                runs.append(run())
            seconds[name] = statistics.mean(runs)
        return seconds

    def prefill_and_decode(self, row, ours, peers):
        """ours: {name: worker}; peers: {name: (worker, tokens that it decodes)}."""
        ids, n = self.ids(self.prompt), self.args.tokens
        probes = []

        def own(worker, test):
            answer = worker.ask(test)
            probes.append(answer["read_gb_per_second"])
            return answer["seconds"]

        candidates = {name: (False, lambda w=w: own(w, "prefill"), len(ids)) for name, w in ours.items()}
        candidates |= {name: (True, lambda w=w: w.ask(do="prefill", ids=ids)["seconds"], len(ids)) for name, (w, _) in peers.items()}
        self.rounds(f"{row}, prefill {len(ids)}", candidates, "tok/s")
        candidates = {name: (False, lambda w=w: own(w, "decode"), n) for name, w in ours.items()}
        candidates |= {name: (True, lambda w=w, m=m: w.ask(do="decode", ids=[1], n=m)["seconds"], m) for name, (w, m) in peers.items() if m}
        self.rounds(f"{row}, decode {n}", candidates, "tok/s")
        print(f"    reading memory meanwhile: {statistics.median(probes):.1f} GB/s")
        probe_buffer = 1 << 28  # of m2lm-bench itself, behind loading
        memory = {name: max(w.ready["peak_memory_bytes"], w.ask("decode")["peak_memory_bytes"] - probe_buffer) for name, w in ours.items()}
        memory |= {name: w.ask(do="prefill", ids=ids[:8] if "torch" not in name else ids)["peak_memory_bytes"] for name, (w, _) in peers.items()}
        print("    peak memory, MiB: " + ", ".join(f"{name} {b / 2**20:.0f}" for name, b in memory.items()), flush=True)
        if self.args.json:
            with open(self.args.json, "a") as file:
                file.write(json.dumps({"row": f"{row}, memory", "memory": memory, "probe": statistics.median(probes)}) + "\n")
        for w in [*ours.values(), *(w for w, _ in peers.values())]:
            w.close()


def language(s, row, precisions, peers, isa=None):
    """peers: {name: (format, function that starts it, tokens to decode)}"""
    for p in precisions:
        s.check_ours(p, isa)
    started = {}
    for name, (format_, start, tokens) in peers.items():
        try:
            worker = start()
        except (OSError, RuntimeError) as error:
            print(f"    {name} is left out: {error}", flush=True)
            continue
        s.check(name, format_, worker, s.ids(s.prompt))
        started[name] = (worker, tokens)
    lengths = ["-p", s.prompt, "-n", s.args.tokens]
    s.prefill_and_decode(row, {f"m2lm {p}": s.ours(p, *lengths, isa=isa) for p in precisions}, started)


def four_bit(s):
    n = s.args.tokens
    language(s, "4-bit, blocks of 32", ["q4"], {
        "llama.cpp Q4_0": ("q4_0", lambda: s.llama("q4_0", "--flash", "on"), n),
        "ik_llama.cpp Q4_0": ("q4_0", lambda: s.ik("q4_0", False), n // 4),
        "ik_llama.cpp Q4_0 -rtr": ("q4_0", lambda: s.ik("q4_0", True), n),
        "OpenVINO int4 32": ("int4", lambda: s.openvino("int4-32", "--group", "32"), n // 4)})


def four_bit_128(s):
    language(s, "4-bit, groups of 128", ["q4_128"], {
        "OpenVINO int4 128": ("int4", lambda: s.openvino("int4-128", "--group", "128"), s.args.tokens // 4)})


def eight_bit(s):
    n = s.args.tokens
    language(s, "8-bit", ["w8a8", "q8"], {
        "torch int8": ("int8", lambda: s.pytorch("int8", "--context", s.prompt + 128), n // 4),
        "OpenVINO int8": ("int8", lambda: s.openvino("int8"), n // 4),
        "CTranslate2 int8": ("int8", s.ctranslate2, n // 4),
        "ik_llama.cpp Q8_0 -rtr": ("q8_0", lambda: s.ik("q8_0", True), n),
        "llama.cpp Q8_0": ("q8_0", lambda: s.llama("q8_0", "--flash", "on"), n)})


def bf16(s):
    n = s.args.tokens
    language(s, "bf16", ["bf16"], {
        "torch compiled": ("bf16", lambda: s.pytorch("bf16", "--context", s.prompt + 128), n // 4),
        "torch eager": ("bf16", lambda: s.pytorch("bf16", "--eager", "--context", s.prompt + 128), n // 4),
        "OpenVINO bf16": ("bf16", lambda: s.openvino("bf16"), n // 4),
        "llama.cpp BF16": ("bf16", lambda: s.llama("bf16", "--flash", "on"), n // 4)})


def context(s):
    """Flash attention off: with it llama.cpp decodes at a third of the speed here."""
    n, ids = 32, s.ids(s.args.depth)
    ours = s.ours("q4", "-p", "0", "-n", n, "--depth", len(ids))
    llama = s.llama("q4_0", "--flash", "off", "--context", (len(ids) + n + 255) // 256 * 256)
    s.rounds(f"4-bit, decode behind {len(ids)}", {
        "m2lm q4": (False, lambda: ours.ask("decode")["seconds"], n),
        "llama.cpp Q4_0": (True, lambda: llama.ask(do="decode", ids=ids, n=n)["seconds"], n)}, "tok/s")
    ours.close()
    llama.close()


def batch(s):
    n, prompts = 32, [s.ids(length) for length in LENGTHS]
    ours = s.ours("q4", "-n", n, "--lengths", ",".join(map(str, LENGTHS)))
    llama = s.llama("q4_0", "--flash", "off", "--context", "8192", "--sequences", len(prompts))
    s.rounds(f"4-bit, {len(prompts)} ragged prompts", {
        "m2lm q4": (False, lambda: ours.ask("decode")["seconds"], len(prompts) * n),
        "llama.cpp Q4_0": (True, lambda: llama.ask(do="batch", prompts=prompts, n=n)["seconds"], len(prompts) * n)}, "tok/s")
    ours.close()
    llama.close()


def clip_reference(s):
    """Normalised pixels and the f32 features of them, by OpenVINO in f32."""
    from safetensors.numpy import load_file
    dump = s.scratch / "clip.safetensors"
    subprocess.run([s.args.bench, "--model", s.clip, "--clip", "--precision", "f32", "-r", "1", "--dump", dump], check=True, stdout=subprocess.DEVNULL)
    pixels = s.scratch / "pixels.npy"
    np.save(pixels, load_file(dump)["pixels"].reshape(1, 3, 336, 336))
    worker = s.openvino("bf16", "--clip", "--hint", "f32", folder=s.clip)
    worker.ask(do="encode", pixels=str(pixels), features=str(s.scratch / "f32.npy"))
    worker.close()
    return pixels, np.load(s.scratch / "f32.npy")


def cosines(a, b):
    c = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return float(c.mean()), float(c.min())


def clip_row(s, row, precisions, peers):
    """peers: {name: function that starts it}"""
    from safetensors.numpy import load_file
    pixels, want = clip_reference(s)

    def show(name, got):
        patches = want[-got.size // want.shape[1]:]  # m2lm drops the class token
        mean, least = cosines(got.reshape(patches.shape), patches)
        print(f"    {name}: cosine of features to f32 {mean:.6f}, least {least:.6f}", flush=True)
        if s.args.json:
            with open(s.args.json, "a") as file:
                file.write(json.dumps({"row": "CLIP, cosine", "who": name, "mean": mean, "least": least}) + "\n")
        if mean < 0.97:
            sys.exit(f"{name} computes something else than f32")

    def peer(name, worker):
        path = s.scratch / "features.npy"
        worker.ask(do="encode", pixels=str(pixels), features=str(path))
        show(name, np.load(path))
        return worker

    def own(precision):
        dump = s.scratch / "clip.safetensors"
        subprocess.run([s.args.bench, "--model", s.clip, "--clip", "--precision", precision, "-r", "1", "--dump", dump], check=True, stdout=subprocess.DEVNULL)
        show(f"m2lm {precision}", load_file(dump)["features"])
        return s.ours(precision, "--clip", model=s.clip)

    ours = {f"m2lm {p}": own(p) for p in precisions}
    theirs = {name: peer(name, start()) for name, start in peers.items()}
    candidates = {n: (False, lambda w=w: w.ask("clip")["seconds"], 1) for n, w in ours.items()}
    candidates |= {n: (True, lambda w=w: w.ask(do="encode", pixels=str(pixels))["seconds"], 1) for n, w in theirs.items()}
    s.rounds(f"CLIP L/14-336, {row}", candidates, "ms")
    for w in [*ours.values(), *theirs.values()]:
        w.close()


def clip_torch(s, format_):
    return Worker([s.python, HERE / "workers/pytorch_clip.py", s.clip, "--threads", s.args.threads, "--format", format_])


def clip(s):
    openvino = lambda name: s.openvino(name, "--clip", folder=s.clip)
    clip_row(s, "bf16", ["bf16"], {"OpenVINO bf16": lambda: openvino("bf16"), "torch bf16": lambda: clip_torch(s, "bf16"),
                                   "onnxruntime f32": lambda: s.onnx("f32")})
    clip_row(s, "8-bit", ["w8a8", "q8"], {"OpenVINO int8, static": lambda: openvino("int8-static"), "OpenVINO int8 weights": lambda: openvino("int8"),
                                          "torch int8": lambda: clip_torch(s, "int8"), "onnxruntime int8": lambda: s.onnx("int8")})


def without_amx(s):
    """As on a machine that has AVX-512 with bf16 and byte products and no AMX. OpenVINO with the f32 hint, the faster there. Left out are llama.cpp
    and onnxruntime, which do not ask the environment, PyTorch in int8, which does not come to an end under the cap, and CTranslate2 in int8, whose
    logits are wrong under it (cosine 0.76 to f32)."""
    caps = {"M2LM_MAX_ISA": "avx512_bf16", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
    n = s.args.tokens
    os.environ.update(caps)
    try:
        language(s, "without AMX, 4-bit", ["q4"], {
            "ik_llama.cpp Q4_0": ("q4_0", lambda: s.ik("q4_0", False), n // 4), "ik_llama.cpp Q4_0 -rtr": ("q4_0", lambda: s.ik("q4_0", True), n),
            "OpenVINO int4 32": ("int4", lambda: s.openvino("int4-32", "--group", "32", "--hint", "f32"), n // 4)})
        language(s, "without AMX, 8-bit", ["w8a8", "q8"], {
            "ik_llama.cpp Q8_0 -rtr": ("q8_0", lambda: s.ik("q8_0", True), n),
            "OpenVINO int8": ("int8", lambda: s.openvino("int8", "--hint", "f32"), n // 4)})
        language(s, "without AMX, bf16", ["bf16"], {"torch compiled": ("bf16", lambda: s.pytorch("bf16", "--context", s.prompt + 128), n // 4)})
        clip_row(s, "8-bit, without AMX", ["w8a8"], {
            "OpenVINO int8, static": lambda: s.openvino("int8-static", "--clip", "--hint", "f32", folder=s.clip)})
    finally:
        for name in caps:
            del os.environ[name]


def picture(s):
    """A picture and 33 tokens in, the first token out: 576 + 33 positions. OpenVINO's parts one after the other, without a projector; llama.cpp by what
    llama-mtmd-cli does."""
    llava, n = s.peers / "models/llava-1.1b", 33
    if not llava.exists():
        subprocess.run([s.args.bench, "--random", "llava-1.1b", "--write-checkpoint", llava], check=True)
        for python, kind in ((s.python, "gguf"), (s.python, "mmproj"), (s.peers / "llama/bin/python", "quantize")):
            subprocess.run([python, HERE / "convert.py", kind, llava], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pixels, _ = clip_reference(s)
    ids, noise = s.ids(576 + n), s.scratch / "noise.npy"
    np.save(noise, np.random.default_rng(1).integers(0, 256, (336, 336, 3), dtype=np.uint8))
    reference = s.scratch / "picture.npy"
    subprocess.run([s.python, HERE / "workers/transformers_llava.py", llava, noise, ",".join(map(str, ids[:n])), reference], check=True)
    ours = {"m2lm bf16 + q4": s.ours("q4", "--picture", "--text-tokens", str(n), model=llava),
            "m2lm w8a8 + q4": s.ours("q4", "--encoders", "w8a8", "--picture", "--text-tokens", str(n), model=llava)}
    eye = s.openvino("int8-static", "--clip", folder=s.clip)
    text = s.openvino("int4-32", "--group", "32")
    both = lambda: eye.ask(do="encode", pixels=str(pixels))["seconds"] + text.ask(do="prefill", ids=ids)["seconds"]
    candidates = {name: (False, lambda w=worker: w.ask("picture")["seconds"], 1) for name, worker in ours.items()} | {"OpenVINO int8 + int4": (True, both, 1)}
    workers = [*ours.values(), eye, text]
    for encoder in ("q8_0", "bf16"):
        worker = Worker([s.peers / "llama/bin/python", HERE / "workers/llama_cpp.py", llava / "model-q4_0.gguf", "--threads", s.args.threads, "--flash", "on",
                         "--batch", "1024", "--mmproj", llava / f"mmproj-{encoder}.gguf"])
        name, logits = f"llama.cpp mtmd {encoder} + Q4_0", s.scratch / "logits.npy"
        worker.ask(do="picture", picture=str(noise), ids=ids[:n], logits=str(logits))
        s.compare(name, "q4_0", np.load(logits), np.load(reference))
        candidates[name] = (True, lambda w=worker: w.ask(do="picture", picture=str(noise), ids=ids[:n])["seconds"], 1)
        workers.append(worker)
    s.rounds(f"picture + {n} tokens, 4-bit", candidates, "ms")
    for w in workers:
        w.close()


def load(s):
    """From the start of loading to the first token after a prompt of one; each process is a new one."""
    peaks = {}

    def own(model, precision, name):
        worker = s.ours(precision, "-p", "0", "-n", "0", model=model)
        worker.close()
        peaks[name] = worker.ready["peak_memory_bytes"]
        return worker.ready["first_token_seconds"]

    def llama():
        worker = s.llama("q4_0", "--flash", "on")
        answer = worker.ask(do="prefill", ids=[1])
        worker.close()
        peaks["llama.cpp Q4_0"] = answer["peak_memory_bytes"]
        return worker.ready["load_seconds"] + answer["seconds"]

    candidates = {"m2lm q4 of bf16": (False, lambda: own(s.model, "q4", "m2lm q4 of bf16"), 1),
                  "m2lm q4 of Q4_0": (False, lambda: own(s.model / "model-q4_0.gguf", "q4", "m2lm q4 of Q4_0"), 1),
                  "llama.cpp Q4_0": (True, llama, 1)}
    if s.args.packed:
        candidates["m2lm q4 packed"] = (False, lambda: own(s.args.packed, "q4", "m2lm q4 packed"), 1)
    s.rounds("load to first token, 4-bit", candidates, "ms")
    print("    peak memory, MiB: " + ", ".join(f"{name} {b / 2**20:.0f}" for name, b in peaks.items()), flush=True)


def avx2(s):
    n = s.args.tokens
    language(s, "4-bit, AVX2 on both sides", ["q4"], {"llama.cpp Q4_0 (AVX2)": ("q4_0", lambda: s.llama("q4_0", "--flash", "on", build="llama-avx2"), n)}, isa="avx2")


def make_drawn(args, dims):
    """The folder of a checkpoint of these dims in every form that `drawn` needs, made where it is not there."""
    folder = args.peers / "models" / f"random-{args.seed}"
    stamp = folder / "dims.json"
    if stamp.exists() and json.loads(stamp.read_text()) == dims:
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # of other dims, or half made

    def run(python, *command):
        done = subprocess.run([python, HERE / command[0], *map(str, command[1:])], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}")

    python = args.peers / "bin/python"
    options = [f"--{name.replace('_', '-')}={n}" for name, n in dims.items()]
    run(python, "make_models.py", "--out", folder.parent, "--name", folder.name, *options, "llama")
    run(python, "convert.py", "gguf", folder)
    run(args.peers / "llama/bin/python", "convert.py", "quantize", folder)
    (folder / "model-bf16.gguf").unlink()
    stamp.write_text(json.dumps(dims) + "\n")
    return folder


def drawn(args):
    """The rows whose peer was the best at the true dims, as functions by name."""
    dims = draws.decoder(args.seed)
    args.prompt, args.depth = dims.pop("prompt"), dims.pop("depth")
    print("\n" + ", ".join(f"{name} {n}" for name, n in dims.items()) + f", prompt {args.prompt}, context {args.depth}", flush=True)
    args.model = make_drawn(args, dims)
    n = args.tokens

    def llama(s, name):
        return s.llama(name, "--flash", "on", "--context", s.prompt + n, "--batch", s.prompt)

    return {
        "4-bit": lambda s: language(s, "drawn, 4-bit", ["q4"], {"llama.cpp Q4_0": ("q4_0", lambda: llama(s, "q4_0"), n)}),
        "8-bit": lambda s: language(s, "drawn, 8-bit", ["w8a8"], {"torch int8": ("int8", lambda: s.pytorch("int8", "--context", s.prompt + n), 0),
                                                                  "llama.cpp Q8_0": ("q8_0", lambda: llama(s, "q8_0"), n)}),
        "bf16": lambda s: language(s, "drawn, bf16", ["bf16"], {"torch compiled": ("bf16", lambda: s.pytorch("bf16", "--context", s.prompt + n), n // 4)}),
        "context": context}


def add_arguments(parser):
    parser.add_argument("--peers", type=pathlib.Path, required=True, help="where install.sh and make_models.py put the peers and the models")
    parser.add_argument("--bench", type=pathlib.Path, required=True, help="m2lm-bench")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS, help="rows; with --random 4-bit, 8-bit, bf16 and context alone")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4096)
    parser.add_argument("--least", type=float, default=0.3, metavar="SECONDS", help="what a round takes the fastest program at least, by repeating")
    parser.add_argument("--model", type=pathlib.Path, help="another language model than DIR/models/llama-1.1b")
    parser.add_argument("--packed", type=pathlib.Path, help="load: also from this packed checkpoint")


def run(args):
    functions = {"4-bit": four_bit, "4-bit-128": four_bit_128, "8-bit": eight_bit, "bf16": bf16, "context": context, "batch": batch, "clip": clip,
                 "picture": picture, "load": load, "avx2": avx2, "no-amx": without_amx}
    if args.random:
        functions = drawn(args)
    s, failed = Setup(args), []
    for name in args.only:
        if name not in functions:
            continue
        try:
            functions[name](s)
        except RuntimeError as error:
            print(f"{name}: {error}", flush=True)
            failed.append(name)
    print(json.dumps(s.machine))
    if failed:
        sys.exit("without a result: " + ", ".join(failed))

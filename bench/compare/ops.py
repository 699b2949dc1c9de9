"""Speed of single kernels against oneDNN (through PyTorch), PyTorch and OpenVINO, in one process and in turns.

Prints medians and their ratio (above 1: this library is faster). Matrices are packed beforehand on both sides. This library's x and y are f32,
converted or quantised within its time; oneDNN gets x in its own format and writes bf16 from bf16, f32 from bytes. Attention of this library is
timed with laying out keys and values ("m2lm") and without ("m2lm, laid out"); PyTorch and OpenVINO get and give bf16. Everything is compared
with f32 before it is timed. Where the machine has AMX, all is also run without it on both sides.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

import draws
from machine import LEVELS, Probe, alternate, build, describe, load, medians, print_machine

SHAPES = [(512, 2048, 5632), (577, 1024, 4096), (1500, 1280, 5120)]  # m, k, n
ATTENTION = [(577, 16, 64, 0), (1500, 20, 64, 0), (512, 32, 64, 1)]  # tokens, heads, head_dim, causal
TOLERANCE = {"f32": 1e-5, "bf16": 1e-2, "w8a8": 3e-2, "q8": 2e-2, "q4": 0.2, "q4_128": 0.25}  # |y - f32| / |f32| of N(0, 1) data
# Without AMX oneDNN has nothing for these bytes but its reference kernel, which takes minutes for a product: a few rows tell.
# A core does 0.04 x 10^9 products a second by it, and hundreds of times as many by any other kernel.
FEW, LEAST_OF_A_CORE = 8, 1e8  # rows; products a second
PEAK_OF = {"f32": ["f32"], "bf16": ["amx_bf16", "bf16_dot", "f32"], "int8": ["amx_int8", "int8_dot"]}


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class Table:
    def __init__(self, machine, path):
        self.machine, self.path = machine, path

    def add(self, row, times, work, unit, peers, peak=None):
        """Ratios of everything of ours to the best of `peers`."""
        middle = medians(times)
        best = min(peers, key=middle.get) if peers else None
        for name, seconds in middle.items():
            rate = work / seconds / 1e9
            of_peak = f"  {rate / peak:4.0%} of the peak" if peak else ""
            ratio = None if name in peers or not best else middle[best] / seconds
            compared = f"  {ratio:5.2f}x {best}" if ratio else ""
            spread = (max(times[name]) - min(times[name])) / seconds
            print(f"{row:30} {name:26} {seconds * 1e3:9.2f} ms {rate:8.1f} {unit} (spread {spread:4.0%}){of_peak}{compared}", flush=True)
            if self.path:
                with open(self.path, "a") as file:
                    file.write(json.dumps({"row": row, "who": name, "peer": name in peers, "value": rate, "unit": unit, "seconds": times[name],
                                           "of_peak": rate / peak if peak else None, "ratio": ratio,
                                           "best_peer": best, "machine": self.machine}) + "\n")

    def peak(self, kind):
        return next((self.machine["peaks"][p] for p in PEAK_OF[kind] if p in self.machine["peaks"]), None)


def check(what, got, want, tolerance):
    error = ((got - want).norm() / want.norm()).item()
    if not error <= tolerance:
        sys.exit(f"{what} differs from f32 by {error:.3g}, more than {tolerance}")


def gemm(lib, torch, args, isa, table, shapes):
    for m, k, n in shapes:
        x, w = torch.randn(m, k), torch.randn(n, k) / k**0.5
        y, want = torch.empty(m, n), x @ w.T

        def ours(format_, level=isa, dot=-1):
            h = lib.bench_gemm_new(args.threads, level, dot, format_.encode(), m, n, k, x.data_ptr(), w.data_ptr())
            lib.bench_gemm_run(h, y.data_ptr())
            check(f"m2lm {format_} {m} x {k} x {n}", y, want, TOLERANCE[format_])
            handles.append(h)
            return lambda: lib.bench_gemm_run(h, y.data_ptr())

        for kind in ("f32", "bf16"):
            handles = []
            dtype = getattr(torch, {"f32": "float32", "bf16": "bfloat16"}[kind])
            tx, tw = x.to(dtype), w.to(dtype)
            packed = torch.ops.mkldnn._reorder_linear_weight(tw, m)
            onednn = lambda: torch.ops.mkldnn._linear_pointwise(tx, packed, None, "none", [], "")
            check(f"oneDNN {kind}", onednn().float(), want, TOLERANCE[kind])
            candidates = {"m2lm": ours(kind), "oneDNN": lambda: timed(onednn), "torch linear": lambda: timed(lambda: torch.nn.functional.linear(tx, tw))}
            table.add(f"GEMM {kind} {m}x{k}x{n}", alternate(candidates, args.rounds), 2.0 * m * n * k, "GFLOP/s", ["oneDNN", "torch linear"], table.peak(kind))
            for h in handles:
                lib.bench_gemm_free(h)

        handles = []
        x_scale = x.abs().max() / 127
        qx = (x / x_scale).round().to(torch.int8)
        w_scale = w.abs().amax(1) / 127
        qw = (w / w_scale[:, None]).round().to(torch.int8)
        packed, zeros = torch.ops.onednn.qlinear_prepack(qw, [m, k]), torch.zeros(n, dtype=torch.int64)
        product = lambda rows: torch.ops.onednn.qlinear_pointwise(rows, x_scale.item(), 0, packed, w_scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        onednn = lambda: product(qx)
        candidates, peers = {f"m2lm {f}": ours(f) for f in ("w8a8", "q8", "q4", "q4_128")}, []
        few = min(timed(lambda: product(qx[:FEW])) for _ in range(3))
        if FEW * k * n / few > LEAST_OF_A_CORE * args.threads:
            check("oneDNN int8", onednn(), want, TOLERANCE["w8a8"])
            candidates["oneDNN"], peers = lambda: timed(onednn), ["oneDNN"]
        else:
            print(f"oneDNN int8 is left out: {few:.1f} s for {FEW} rows, by its reference kernel", flush=True)
        table.add(f"GEMM int8 {m}x{k}x{n}", alternate(candidates, args.rounds), 2.0 * m * n * k, "GOP/s", peers, table.peak("int8"))
        for h in handles:
            lib.bench_gemm_free(h)


def openvino_attention(torch, args, tokens, heads, dim, causal, q, k, v):
    """Seconds of one run, and what it gives."""
    import numpy as np
    import openvino as ov
    import openvino.opset13 as op
    c = lambda x: op.constant(np.array(x, np.int64))
    inputs = [op.parameter([1, tokens, heads * dim], ov.Type.bf16) for _ in range(3)]
    split = [op.transpose(op.reshape(p, c([1, tokens, heads, dim]), False), c([0, 2, 1, 3])) for p in inputs]
    joined = op.transpose(op.scaled_dot_product_attention(*split, causal=bool(causal)), c([0, 2, 1, 3]))
    model = ov.Model([op.reshape(joined, c([1, tokens, heads * dim]), False)], inputs)
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": args.threads, "PERFORMANCE_HINT": "LATENCY"})
    request = compiled.create_infer_request()
    bits = [x.view(1, tokens, -1).to(torch.bfloat16).view(torch.int16).numpy() for x in (q, k, v)]  # shared with the tensors, so they must live
    for i, x in enumerate(bits):
        request.set_input_tensor(i, ov.Tensor(x, x.shape, ov.Type.bf16))
    request.infer()
    got = torch.from_numpy(np.array(request.get_output_tensor(0).data).view(np.int16).copy()).view(torch.bfloat16).float()[0]
    return (lambda bits=bits: timed(request.infer)), got


def attention(lib, torch, args, isa, table, shapes):
    for tokens, heads, dim, causal in shapes:
        q, k, v = (torch.randn(tokens, heads * dim) for _ in range(3))
        y = torch.empty(tokens, heads * dim)
        split = lambda dtype: [t.to(dtype).view(tokens, heads, dim).transpose(0, 1).unsqueeze(0).contiguous() for t in (q, k, v)]
        join = lambda t: t[0].transpose(0, 1).reshape(tokens, heads * dim).float()
        sdpa = lambda parts: torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=bool(causal))
        want = join(sdpa(split(torch.float32)))
        for kind in ("f32", "bf16"):
            h = lib.bench_attention_new(args.threads, isa, -1, int(kind == "bf16"), tokens, heads, heads, dim, tokens, causal, dim**-0.5,
                                        q.data_ptr(), k.data_ptr(), v.data_ptr())
            lib.bench_attention_run(h, 1, y.data_ptr())
            check(f"m2lm attention {kind}", y, want, 3e-2 if kind == "bf16" else 1e-4)
            parts = split(torch.float32 if kind == "f32" else torch.bfloat16)
            candidates = {"m2lm": lambda: lib.bench_attention_run(h, 1, y.data_ptr()), "m2lm, laid out": lambda: lib.bench_attention_run(h, 0, y.data_ptr()),
                          "torch": lambda: timed(lambda: sdpa(parts))}
            peers = ["torch"]
            if kind == "bf16":
                run, got = openvino_attention(torch, args, tokens, heads, dim, causal, q, k, v)
                check("OpenVINO attention", got, want, 3e-2)
                candidates["OpenVINO"] = run
                peers.append("OpenVINO")
            work = 4.0 * tokens * tokens * heads * dim / (2 if causal else 1)
            table.add(f"attention {kind} {tokens}x{heads}x{dim}{' causal' if causal else ''}", alternate(candidates, args.rounds), work, "GFLOP/s", peers,
                      table.peak(kind))
            lib.bench_attention_free(h)


def gemv(lib, torch, args, isa, table):
    n, k = 16384, 8192
    bits = {"f32": 32, "bf16": 16, "q8": 8.5, "w8a8": 8, "q4": 4.5, "q4_128": 4.125}
    x, w = torch.randn(1, k), torch.randn(n, k) / k**0.5
    y, want = torch.empty(1, n), x @ w.T
    probe = Probe(lib, args.threads)
    for format_, width in bits.items():
        h = lib.bench_gemm_new(args.threads, isa, -1, format_.encode(), 1, n, k, x.data_ptr(), w.data_ptr())
        lib.bench_gemm_run(h, y.data_ptr())
        check(f"m2lm {format_} with one row", y, want, TOLERANCE[format_])
        candidates = {"m2lm": lambda: lib.bench_gemm_run(h, y.data_ptr()), "reading": lambda: n * k * width / 8e9 / probe()}
        peers = ["reading"]
        if format_ in ("f32", "bf16"):
            tx, tw = (t.to(torch.bfloat16 if format_ == "bf16" else torch.float32) for t in (x, w))
            packed = torch.ops.mkldnn._reorder_linear_weight(tw, 1)
            candidates["oneDNN"] = lambda: timed(lambda: torch.ops.mkldnn._linear_pointwise(tx, packed, None, "none", [], ""))
        table.add(f"one row, {format_} {k}x{n}", alternate(candidates, args.rounds), n * k * width / 8, "GB/s", peers)
        lib.bench_gemm_free(h)


def measure(args):
    import torch
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    lib = load(args.library)
    isa = lib.bench_isa()
    machine = describe(lib, args.threads)
    machine["torch"], machine["onednn_cap"] = torch.__version__, os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    print_machine(machine)
    print(f"torch {torch.__version__}, ONEDNN_MAX_CPU_ISA={machine['onednn_cap'] or '(unset)'}, M2LM_MAX_ISA={os.environ.get('M2LM_MAX_ISA', '(unset)')}")
    table, shapes, encoders = Table(machine, args.json), SHAPES, ATTENTION
    if args.random:
        shapes, encoders = draws.products(args.seed), draws.encoders(args.seed)
    if "gemm" in args.only:
        gemm(lib, torch, args, isa, table, shapes)
    if "attention" in args.only:
        attention(lib, torch, args, isa, table, encoders)
    if "gemv" in args.only:
        gemv(lib, torch, args, isa, table)


def run(args):
    if args.library:
        measure(args)
        return
    with tempfile.TemporaryDirectory() as directory:
        library = build(directory, args.compiler)
        caps = [None, ("AVX512_CORE_BF16", "avx512_bf16")] if "amx_bf16" in open("/proc/cpuinfo").read() else [None]
        for cap in caps[:1] if args.no_caps else caps:
            environment = dict(os.environ, ONEDNN_MAX_CPU_ISA=cap[0], M2LM_MAX_ISA=cap[1]) if cap else dict(os.environ)
            subprocess.run([sys.executable, *sys.argv, "--library", str(library)], check=True, env=environment)


def add_arguments(parser):
    parser.add_argument("--compiler", default=os.environ.get("CXX", "c++"))
    parser.add_argument("--only", nargs="+", choices=["gemm", "attention", "gemv"], default=["gemm", "attention", "gemv"])
    parser.add_argument("--no-caps", action="store_true", help="not also without AMX")
    parser.add_argument("--library", help="what bench/kernels/kernels.cpp was built to")

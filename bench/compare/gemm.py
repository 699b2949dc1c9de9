#!/usr/bin/env python3
"""Speed of the CPU kernels against oneDNN (through PyTorch), in one process and in turns.

    pip install torch==2.15.0
    python bench/compare/gemm.py [--rounds 15] [--threads 2]

Prints medians and their ratio (above 1: this library is faster). Rounds alternate between the libraries with a pause before each,
so that neither is timed while the other's threads still spin, and a slow phase of the machine falls on both. Where oneDNN would use
AMX, everything is also run with ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16: like with like, since this library has no AMX kernels.
Both get packed weights. Two rows of bf16 are the same kernels ("m2lm" and the default of the two below it): how far apart they come
out is the noise of the run. Attention is compared with scaled_dot_product_attention, decoding with the speed of reading memory.
"""

import argparse
import ctypes
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHAPES = [(512, 2048, 5632), (577, 1024, 4096), (1500, 1280, 5120)]  # m, k, n
LEVELS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]


def build(directory, compiler):
    library = pathlib.Path(directory) / "kernels.so"
    subprocess.run([compiler, "-std=c++20", "-O2", "-shared", "-fPIC", "-pthread", f"-I{ROOT / 'include'}",
                    str(ROOT / "bench/kernels/kernels.cpp"), "-o", str(library)], check=True)
    return library


def load(path):
    lib = ctypes.CDLL(str(path))
    p, i, n, d = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
    lib.bench_peak.argtypes, lib.bench_peak.restype = [i, i], d
    lib.bench_read_new.argtypes, lib.bench_read_new.restype = [n, i], p
    lib.bench_read_run.argtypes, lib.bench_read_run.restype = [p, n, i], d
    lib.bench_read_free.argtypes, lib.bench_read_free.restype = [p], None
    lib.bench_gemm_new.argtypes, lib.bench_gemm_new.restype = [i, i, i, i, n, n, n, p, p], p
    lib.bench_attention_new.argtypes, lib.bench_attention_new.restype = [i, i, i, i, n, n, n, n, n, i, d, p, p, p], p
    for kind in ("gemm", "attention"):
        run, free = getattr(lib, f"bench_{kind}_run"), getattr(lib, f"bench_{kind}_free")
        run.argtypes, run.restype = [p, p], d
        free.argtypes, free.restype = [p], None
    return lib


def cpu_model():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown CPU"


def alternate(candidates, rounds):
    """Median seconds by name of functions that return seconds."""
    times = {name: [] for name in candidates}
    for round_ in range(rounds + 2):
        for name, run in candidates.items():
            time.sleep(0.02)
            seconds = run()
            if round_ >= 2:  # the first two warm up
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def report(title, medians, work, unit, base):
    for name, seconds in medians.items():
        ratio = "" if name == base else f"  {medians[base] / seconds:5.2f}x {base}"
        print(f"{title:32} {name:26} {seconds * 1e3:9.2f} ms {work / seconds / 1e9:8.1f} {unit}{ratio}", flush=True)


def gemm(lib, torch, args, isa, shapes):
    for m, k, n in shapes:
        x, w = torch.randn(m, k), torch.randn(n, k) / k**0.5
        y = torch.empty(m, n)
        for bf16 in (0, 1):
            dtype = torch.bfloat16 if bf16 else torch.float32
            tx, tw = x.to(dtype), w.to(dtype)
            packed = torch.ops.mkldnn._reorder_linear_weight(tw, m)
            handles = {"m2lm": lib.bench_gemm_new(args.threads, isa, -1, bf16, m, n, k, x.data_ptr(), w.data_ptr())}
            if bf16 and isa >= 3:
                for dot, name in ((0, "m2lm, f32 products"), (1, "m2lm, BF16 instructions")):
                    handles[name] = lib.bench_gemm_new(args.threads, isa, dot, bf16, m, n, k, x.data_ptr(), w.data_ptr())
            candidates = {name: (lambda h=h: lib.bench_gemm_run(h, y.data_ptr())) for name, h in handles.items()}
            onednn = lambda: torch.ops.mkldnn._linear_pointwise(tx, packed, None, "none", [], "")
            candidates["oneDNN"] = lambda: timed(onednn)
            candidates["torch linear"] = lambda: timed(lambda: torch.nn.functional.linear(tx, tw))
            medians = alternate(candidates, args.rounds)
            lib.bench_gemm_run(handles["m2lm"], y.data_ptr())
            error = (y - onednn().float()).abs().max().item() / y.abs().max().item()
            report(f"{'bf16' if bf16 else 'f32'} {m} x {k} x {n}", medians, 2.0 * m * n * k, "GFLOP/s", "oneDNN")
            if error > (2e-2 if bf16 else 1e-4):
                sys.exit(f"the results differ by {error:.2g}")
            for h in handles.values():
                lib.bench_gemm_free(h)


def attention(lib, torch, args, isa):
    tokens, heads, dim = 577, 16, 64
    q, k, v = (torch.randn(tokens, heads * dim) for _ in range(3))
    y = torch.empty(tokens, heads * dim)
    for bf16 in (0, 1):
        dtype = torch.bfloat16 if bf16 else torch.float32
        split = [t.to(dtype).view(tokens, heads, dim).transpose(0, 1).unsqueeze(0).contiguous() for t in (q, k, v)]
        h = lib.bench_attention_new(args.threads, isa, -1, bf16, tokens, heads, heads, dim, tokens, 0, dim**-0.5,
                                    q.data_ptr(), k.data_ptr(), v.data_ptr())
        theirs = lambda: torch.nn.functional.scaled_dot_product_attention(*split)
        medians = alternate({"m2lm": lambda: lib.bench_attention_run(h, y.data_ptr()), "torch": lambda: timed(theirs)}, args.rounds)
        report(f"{'bf16' if bf16 else 'f32'} attention {tokens} x {heads} x {dim}", medians, 4.0 * tokens * tokens * heads * dim, "GFLOP/s", "torch")
        want = theirs()[0].transpose(0, 1).reshape(tokens, heads * dim).float()
        if (y - want).abs().max().item() > 3e-2:
            sys.exit("the results differ")
        lib.bench_attention_free(h)


def decode(lib, torch, args, isa):
    n, k = 16384, 8192
    x, w = torch.randn(1, k), torch.randn(n, k) / k**0.5
    y = torch.empty(1, n)
    reader = lib.bench_read_new(n * k * 4, args.threads)
    for bf16 in (0, 1):
        size = n * k * (2 if bf16 else 4)
        tx, tw = (t.to(torch.bfloat16 if bf16 else torch.float32) for t in (x, w))
        packed = torch.ops.mkldnn._reorder_linear_weight(tw, 1)
        h = lib.bench_gemm_new(args.threads, isa, -1, bf16, 1, n, k, x.data_ptr(), w.data_ptr())
        medians = alternate({"m2lm": lambda: lib.bench_gemm_run(h, y.data_ptr()),
                             "oneDNN": lambda: timed(lambda: torch.ops.mkldnn._linear_pointwise(tx, packed, None, "none", [], "")),
                             "reading": lambda: lib.bench_read_run(reader, size, 1),
                             "reading, 4 streams": lambda: lib.bench_read_run(reader, size, 4)}, args.rounds)
        report(f"{'bf16' if bf16 else 'f32'} decode 1 x {k} x {n}", medians, size, "GB/s", "oneDNN")
        best = min(medians["reading"], medians["reading, 4 streams"])
        print(f"{'':32} m2lm at {best / medians['m2lm']:.2f} of the faster way of reading")
        if min(medians["m2lm"], medians["oneDNN"]) < 0.95 * best:
            print(f"{'':32} (a product beat it: the machine is too noisy, or reading is no ceiling here)")
        lib.bench_gemm_free(h)
    lib.bench_read_free(reader)


def measure(args):
    import torch
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    lib = load(args.library)
    isa = lib.bench_isa()
    print(f"\n{cpu_model()}, {os.cpu_count()} cores, level {LEVELS[isa]}, {args.threads} threads, torch {torch.__version__}, "
          f"ONEDNN_MAX_CPU_ISA={os.environ.get('ONEDNN_MAX_CPU_ISA', '(unset)')}")
    print(f"one core at its best: f32 {lib.bench_peak(0, isa):.0f} GFLOP/s, BF16 instructions {lib.bench_peak(1, isa):.0f} GFLOP/s\n")
    if "gemm" in args.only:
        gemm(lib, torch, args, isa, SHAPES)
    if "attention" in args.only:
        attention(lib, torch, args, isa)
    if "decode" in args.only:
        decode(lib, torch, args, isa)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiler", default=os.environ.get("CXX", "c++"))
    parser.add_argument("--only", nargs="+", choices=["gemm", "attention", "decode"], default=["gemm", "attention", "decode"])
    parser.add_argument("--library", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.library:
        measure(args)
        return
    with tempfile.TemporaryDirectory() as directory:
        library = build(directory, args.compiler)
        amx = "amx_bf16" in open("/proc/cpuinfo").read()
        for cap in (["AVX512_CORE_BF16"] if amx else []) + [None]:
            environment = dict(os.environ, ONEDNN_MAX_CPU_ISA=cap) if cap else dict(os.environ)
            command = [sys.executable, __file__, "--library", str(library), "--rounds", str(args.rounds), "--threads", str(args.threads),
                       "--only", *args.only]
            subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()

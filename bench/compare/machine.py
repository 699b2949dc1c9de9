"""The kernels of this library as a shared object, the limits of the machine, and rounds that are taken in turns."""

import ctypes
import datetime
import os
import pathlib
import statistics
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
LEVELS = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
PEAKS = ["f32", "bf16_dot", "int8_dot", "amx_bf16", "amx_int8"]


def build(directory, compiler):
    library = pathlib.Path(directory) / "kernels.so"
    subprocess.run([compiler, "-std=c++20", "-O2", "-shared", "-fPIC", "-pthread", f"-I{ROOT / 'include'}",
                    str(ROOT / "bench/kernels/kernels.cpp"), "-o", str(library)], check=True)
    return library


def load(path):
    lib = ctypes.CDLL(str(path))
    p, i, n, d, s = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_char_p
    lib.bench_peak.argtypes, lib.bench_peak.restype = [i, i], d
    lib.bench_read_new.argtypes, lib.bench_read_new.restype = [n, i], p
    lib.bench_read_run.argtypes, lib.bench_read_run.restype = [p, n, i], d
    lib.bench_gemm_new.argtypes, lib.bench_gemm_new.restype = [i, i, i, s, n, n, n, p, p], p
    lib.bench_gemm_run.argtypes, lib.bench_gemm_run.restype = [p, p], d
    lib.bench_attention_new.argtypes, lib.bench_attention_new.restype = [i, i, i, i, n, n, n, n, n, i, d, p, p, p], p
    lib.bench_attention_run.argtypes, lib.bench_attention_run.restype = [p, i, p], d
    for kind in ("read", "gemm", "attention"):
        free = getattr(lib, f"bench_{kind}_free")
        free.argtypes, free.restype = [p], None
    return lib


def cpu_model():
    family = name = ""
    for line in open("/proc/cpuinfo"):
        if line.startswith("cpu family"):
            family = line.split(":", 1)[1].strip()
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
    return f"{name} (family {family})" if name else "unknown CPU"


class Probe:
    """GB/s of reading memory, by `threads` threads, the faster of one and of four places at a time."""

    def __init__(self, lib, threads, size=1 << 28):
        self.lib, self.size, self.reader = lib, size, lib.bench_read_new(size, threads)

    def __call__(self):
        return self.size / min(self.lib.bench_read_run(self.reader, self.size, streams) for streams in (1, 4)) / 1e9


def describe(lib, threads, isa=None):
    """The machine as a dictionary; peaks are of `threads` cores, in 10^9 operations per second, as one core's times their number."""
    isa = lib.bench_isa() if isa is None else isa
    peaks = {name: lib.bench_peak(kind, isa) * threads for kind, name in enumerate(PEAKS)}
    return {"processor": cpu_model(), "cores": os.cpu_count(), "threads": threads, "level": LEVELS[isa],
            "peaks": {k: round(v) for k, v in peaks.items() if v > 0}, "read_gb_per_second": round(Probe(lib, threads)(), 1),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")}


def print_machine(m):
    print(f"\n{m['date']}: {m['processor']}, {m['threads']} of {m['cores']} cores, level {m['level']}, reading {m['read_gb_per_second']} GB/s")
    print("peaks, 10^9 operations per second: " + ", ".join(f"{k} {v}" for k, v in m["peaks"].items()) + "\n", flush=True)


def alternate(candidates, rounds, warm=1, pause=0.05, settle=0.03, least=0.02, runs=7):
    """Seconds of each round by name of functions that return seconds: the median of `runs` and more that last `least` seconds, behind `settle`
    seconds that wake the threads and fill the caches (behind a pause two threads may share a core for as long, of any program). Rounds
    alternate, with a pause before each, so that nothing is timed while another's threads still spin, and a slow phase of the machine falls on all."""
    def run_for(run, times, span):
        start, seconds = time.perf_counter(), []
        while len(seconds) < times or time.perf_counter() - start < span:
            seconds.append(run())
        return seconds

    times = {name: [] for name in candidates}
    for round_ in range(rounds + warm):
        for name, run in candidates.items():
            time.sleep(pause)
            run_for(run, 2, settle)
            seconds = run_for(run, runs, least)
            if round_ >= warm:
                times[name].append(statistics.median(seconds))
    return times


def medians(times):
    return {name: statistics.median(values) for name, values in times.items()}

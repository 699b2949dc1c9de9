#!/usr/bin/env python3
"""What bench/compare --random draws is valid for every peer, is the same for the same seed, and covers what it promises; rounds last long enough and begin warm."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "bench/compare"))
import draws  # noqa: E402
import machine  # noqa: E402

SEEDS = range(1000)


def fail(text):
    sys.exit(f"compare_draws: {text}")


def side_is_right(n):
    return n % 32 == 0 and 512 <= n <= 5120


class Clock:
    """Takes the place of the module time, so that this depends on no machine."""
    now = rested = 0.0

    def sleep(self, seconds):
        self.now += seconds
        self.rested = self.now

    def perf_counter(self):
        return self.now


def rounds_begin_warm():
    """What takes ten times as long for 25 ms behind a pause is timed as it runs later, and short runs are repeated for 20 ms."""
    clock = machine.time = Clock()
    calls = 0

    def run():
        nonlocal calls
        calls += 1
        seconds = 1e-3 if clock.now - clock.rested < 0.025 else 1e-4
        clock.now += seconds
        return seconds

    times = machine.alternate({"a": run}, 3)
    if times != {"a": [1e-4] * 3}:
        fail(f"timed before it is warm: {times}")
    if calls < 4 * 200:
        fail(f"{calls} calls in four rounds")


def main():
    rounds_begin_warm()
    seen = {"prompt": set(), "hidden": set(), "heads": set(), "head_dim": set(), "group": set()}
    for seed in SEEDS:
        d = draws.decoder(seed)
        if d != draws.decoder(seed) or draws.products(seed) != draws.products(seed) or draws.encoders(seed) != draws.encoders(seed):
            fail(f"seed {seed} draws twice differently")
        if not side_is_right(d["hidden"]) or d["heads"] * d["head_dim"] != d["hidden"] or d["head_dim"] % 2 or d["heads"] % d["kv_heads"]:
            fail(f"seed {seed}: no transformer has these dims: {d}")
        # Blocks of 32 along each row: llama.cpp refuses others.
        if d["intermediate"] % 32 or not 2 * d["hidden"] - 32 <= d["intermediate"] <= 3 * d["hidden"] + 32:
            fail(f"seed {seed}: intermediate: {d}")
        if d["prompt"] not in (77, 333, 1500) or not 100 <= d["depth"] <= 3000 or max(d["depth"], d["prompt"]) + 128 > 8192:
            fail(f"seed {seed}: lengths: {d}")
        matrices = d["layers"] * d["hidden"] * (2 * d["hidden"] + 2 * d["kv_heads"] * d["head_dim"] + 3 * d["intermediate"])
        if not 2 <= d["layers"] <= 16 or matrices < 300e6 and d["layers"] < 16 or matrices > 900e6:
            fail(f"seed {seed}: {matrices / 1e6:.0f} M parameters in {d['layers']} layers: {d}")
        for m, k, n in draws.products(seed):
            if m not in (77, 333, 1500) or not side_is_right(k) or not side_is_right(n):
                fail(f"seed {seed}: product {m} x {k} x {n}")
        for tokens, heads, dim, causal in draws.encoders(seed):
            if not 100 <= tokens <= 3000 or not 1 <= heads <= 32 or dim not in (32, 64, 80, 96, 128) or causal not in (0, 1):
                fail(f"seed {seed}: attention {tokens} x {heads} x {dim}")
        for name in ("prompt", "hidden", "heads", "head_dim"):
            seen[name].add(d[name])
        seen["group"].add(d["heads"] // d["kv_heads"])
    if seen["prompt"] != {77, 333, 1500} or seen["head_dim"] != {32, 64, 80, 96, 128} or len(seen["hidden"]) < 140 or 1 not in seen["group"]:
        fail(f"too little is drawn: {seen}")
    if min(seen["hidden"]) > 600 or max(seen["hidden"]) < 5000:
        fail(f"hidden only from {min(seen['hidden'])} to {max(seen['hidden'])}")
    for fastest in (1e-4, 0.024, 0.1, 0.29, 0.3, 0.31, 5.0):
        n = draws.repeats(fastest, 0.3)
        if n * fastest < 0.3 * (1 - 1e-9) or n > 1 and (n - 1) * fastest >= 0.3:
            fail(f"{n} times {fastest} s in a round of 0.3 s")


if __name__ == "__main__":
    main()

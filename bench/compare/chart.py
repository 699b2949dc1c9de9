#!/usr/bin/env python3
"""Draws docs/performance.png from rows that `bench/compare … --json FILE` wrote: ours over the best peer, on a logarithmic scale; or prints them.

    python bench/compare/chart.py docs/performance.jsonl [--out docs/performance.png]
    python bench/compare/chart.py docs/performance.jsonl --table
"""

import argparse
import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def rows_of(path):
    """(row, ours, peer, ratio), in the order of the file; of several of ours in a row each one, the last measurement of each."""
    rows = {}
    for line in open(path):
        r = json.loads(line)
        if r.get("ratio") and r.get("best_peer") not in (None, "reading") and not (r.get("machine") or {}).get("onednn_cap"):
            rows[(r["row"], r["who"])] = (r["best_peer"], r["ratio"])
    return [(row, who, peer, ratio) for (row, who), (peer, ratio) in rows.items()]


def print_table(path):
    """A table in Markdown: what each program did, the best peer in bold."""
    groups = {}
    for line in open(path):
        r = json.loads(line)
        if "value" in r:
            level = " (without AMX)" if (r.get("machine") or {}).get("onednn_cap") else ""
            groups.setdefault(r["row"] + level, {})[r["who"]] = r
    print("| work | m2lm | peers | ratio to the best |\n|---|---|---|---|")
    for row, by_name in groups.items():
        number = lambda r: f"{r['value']:.{0 if r['value'] >= 100 else 1}f}" + (f" ({r['of_peak']:.0%})" if r.get("of_peak") else "")
        unit = next(iter(by_name.values()))["unit"]
        best = next((r["best_peer"] for r in by_name.values() if r["best_peer"]), None)
        ours = [r for r in by_name.values() if not r["peer"]]
        name = lambda r: r["who"].removeprefix("m2lm").strip(" ,") or "m2lm"
        mine = ", ".join((f"{name(r)} " if len(ours) > 1 else "") + number(r) for r in ours)
        theirs = ", ".join(f"**{r['who']} {number(r)}**" if r["who"] == best else f"{r['who']} {number(r)}" for r in by_name.values() if r["peer"])
        ratios = ", ".join((f"{name(r)} " if len(ours) > 1 else "") + f"{r['ratio']:.2f}×" for r in ours if r["ratio"])
        print(f"| {row}, {unit} | {mine} | {theirs} | {ratios} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--out", default="docs/performance.png")
    parser.add_argument("--table", action="store_true", help="print the rows instead, in Markdown")
    args = parser.parse_args()
    if args.table:
        print_table(args.file)
        return
    rows = rows_of(args.file)[::-1]
    figure, axis = plt.subplots(figsize=(11, 0.27 * len(rows) + 1.2))
    colours = ["#2a7f62" if r[3] >= 1 else "#b5523b" for r in rows]
    axis.barh(range(len(rows)), [r[3] - 1 for r in rows], left=1, color=colours, height=0.7)
    for i, (_, _, peer, ratio) in enumerate(rows):
        axis.annotate(f"{ratio:.2f}× {peer}", (ratio, i), xytext=(4 if ratio >= 1 else -4, 0), textcoords="offset points", va="center",
                      ha="left" if ratio >= 1 else "right", fontsize=7)
    axis.set_yticks(range(len(rows)), [f"{row}: {who}" for row, who, _, _ in rows], fontsize=7)
    axis.set_xscale("log")
    least, most = min(r[3] for r in rows), max(r[3] for r in rows)
    axis.set_xlim(min(least, 1) / 2.2, max(most, 1) * 2.2)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10) if axis.get_xlim()[0] <= t <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axis.minorticks_off()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_title("Speed over the best peer's in the same run (right of 1×: m2lm is faster)", fontsize=9)
    figure.tight_layout()
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()

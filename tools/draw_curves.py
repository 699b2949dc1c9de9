#!/usr/bin/env python3
"""Draws two loss curves into one SVG: PyTorch's of tests/golden/train/easy_vqa.json, and m2lm's.

    M2LM_LOSS_CURVE=curve.txt build/dev/tests/unit_train_goldens
    python tools/draw_curves.py curve.txt docs/training_curve.svg
"""
import json
import math
import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 360, 56, 36, 16, 44
HERE = Path(__file__).resolve().parent


def main():
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    theirs = json.loads((HERE.parent / "tests/golden/train/easy_vqa.json").read_text())["losses"]
    ours = [float(line) for line in Path(sys.argv[1]).read_text().split()]
    if len(ours) != len(theirs):
        raise SystemExit(f"{sys.argv[1]}: {len(ours)} losses, PyTorch's curve has {len(theirs)}")
    low, high = math.log(min(theirs) * 0.9), math.log(max(theirs) * 1.1)
    x = lambda step: LEFT + (WIDTH - LEFT - RIGHT) * step / (len(theirs) - 1)
    y = lambda loss: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (math.log(loss) - low) / (high - low)
    line = lambda losses: " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(losses))
    distance = max(abs(a - b) / b for a, b in zip(ours, theirs))
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
           f'<text x="{LEFT}" y="20">Loss of a tiny LLaVA on easy-VQA; largest distance of the curves: {distance:.1e} of the loss</text>']
    for value in (0.25, 0.5, 1, 2, 4):
        if low < math.log(value) < high:
            out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>')
            out.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for step in range(0, len(theirs) + 1, 50):
        at = min(step, len(theirs) - 1)
        out.append(f'<text x="{x(at):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step}</text>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">step</text>')
    out.append(f'<polyline points="{line(theirs)}" fill="none" stroke="#f4a261" stroke-width="5" stroke-linejoin="round"/>')
    out.append(f'<polyline points="{line(ours)}" fill="none" stroke="#1d3557" stroke-width="1.2" stroke-linejoin="round"/>')
    for i, (name, colour, thick) in enumerate((("PyTorch", "#f4a261", 5), ("m2lm on Cpu, f32", "#1d3557", 1.2))):
        at = TOP + 14 + 18 * i
        out.append(f'<line x1="{WIDTH - 180}" x2="{WIDTH - 150}" y1="{at}" y2="{at}" stroke="{colour}" stroke-width="{thick}"/>')
        out.append(f'<text x="{WIDTH - 142}" y="{at + 4}">{name}</text>')
    Path(sys.argv[2]).write_text("\n".join(out + ["</svg>"]) + "\n")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws the include graph of the floors into docs/architecture.md, from the #include lines as they are.

    python3 tools/include_graph.py            rewrites the graph between its two markers
    python3 tools/include_graph.py --check    fails when it is out of date

An arrow says that headers of one floor include headers of another. Arrows that others imply are left out: those to a floor that is also reached by way of another one drawn.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "includes"))
from check_includes import floor_of, includes_of, read_tree  # noqa: E402

DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- include graph: tools/include_graph.py -->", "<!-- end of include graph -->"


def graph():
    tree = read_tree(ROOT / "include" / "m2lm")
    floors, edges = set(), set()
    for name, text in tree.items():
        floor = floor_of(name)
        if floor is None:
            continue
        floors.add(floor)
        for include in includes_of(name, text):
            if include.target.startswith("m2lm/"):
                target = floor_of(include.target.removeprefix("m2lm/"))
                if target not in {None, floor}:
                    edges.add((floor, target))

    def reaches(source, target):
        return any(a == source and (b == target or reaches(b, target)) for a, b in edges)

    drawn = sorted(edge for edge in edges
                   if not any(a == edge[0] and b != edge[1] and reaches(b, edge[1]) for a, b in edges))
    out = [BEGIN, "", "```mermaid", "graph BT"]
    out += [f"  {floor}" for floor in sorted(floors)]
    out += [f"  {a} --> {b}" for a, b in drawn]
    return "\n".join([*out, "```", "", END])


def main():
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    new = before + graph() + rest.split(END)[1]
    if sys.argv[1:] == ["--check"]:
        if new != text:
            sys.exit("the include graph of docs/architecture.md is out of date: run tools/include_graph.py")
    else:
        DOCUMENT.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Reads the #include lines of include/m2lm and checks them against the floors of the library.

- An arrow goes only where FLOORS allows; arrows are transitive.
- Every header opens with what it is, then `// Floor: NAME. May include: …` with the floor of its directory.
- A third-party library is included by its owner in interop/ alone; the owners of readers are reached from definitions
  (*_impl.hpp) and other owners only, so that declarations stay light.
- Definitions (*_impl.hpp) are reached from the headers above all floors and from other definitions only.
- core.hpp reaches no reader; m2lm.hpp reaches every declaration, impl.hpp every definition, m2lm.cuh every .cuh and what
  the backend's .cuh and their emulation share.
- A .hpp never includes a .cuh; no header is part of a cycle; every included m2lm header exists.
- Compilers are told apart in config.hpp only.

Bodies that are included several times on purpose (*.inc.hpp) need no floor line and take no part in the search for cycles.
"""

import argparse
import pathlib
import re
import sys
from typing import NamedTuple

# floor -> the floors it names; everything below those is allowed too
FLOORS = {
    "config": [],
    "core": ["config"],
    "ops": ["core"],
    "interop": ["core"],
    "backends": ["ops", "interop"],
    "layers": ["ops"],
    "parts": ["layers"],
    "io": ["core", "interop"],
    "sampling": ["ops"],
    "models": ["parts", "io", "sampling"],
    "serve": ["models"],
    "train": ["models"],
    "eval": ["core", "io"],
    "testing": ["models", "train", "backends"],
}
CONFIG_HEADERS = {"version.hpp", "config.hpp", "fwd.hpp"}
# The headers that stand above all floors, and the floors that each may include. Those in ADDITIONS stand above m2lm.hpp too.
UMBRELLAS = {
    "core.hpp": {"layers", "backends"},
    "core_impl.hpp": {"layers", "backends"},
    "m2lm.hpp": set(FLOORS),
    "m2lm.cuh": set(FLOORS),
    "impl.hpp": set(FLOORS),
    "xtensor.hpp": set(FLOORS),
}
ADDITIONS = {"xtensor.hpp"}
OPTIONAL = {"xtensor"}  # owners that nothing of the library may reach but such a header

# first part of a third-party include -> the stem of its owner in interop/
THIRD_PARTY = {
    r"(unsupported/)?Eigen/": "eigen",
    r"nlohmann/": "json",
    r"(stb/)?stb_\w+\.h": "stb",
    r"sentencepiece": "sentencepiece",
    r"(xtensor|xtl)/": "xtensor",
    r"sndfile": "sndfile",
    r"lib(av\w+|sw\w+)/": "ffmpeg",
    r"hnswlib/": "hnswlib",
}
READERS = {"json", "stb", "sentencepiece", "sndfile", "ffmpeg", "hnswlib"}  # owners that declarations must not reach
CUDA = r"(cuda|cublas|curand|nv|cub/|thrust/|cute/|mma\.h|cooperative_groups)"
SYSTEM = r"(sys/\w+|linux/\w+|sanitizer/\w+|\w*intrin|ucontext|cpuid|unistd|fcntl|sched|pthread|errno|dlfcn|dirent|signal)\.h"


class Include(NamedTuple):
    source: str  # relative to include/m2lm
    line: int
    target: str  # as written


def floor_of(path):
    """The floor of a header named relative to include/m2lm; None for the headers that stand above all floors."""
    directory, _, _ = path.partition("/")
    if path in CONFIG_HEADERS:
        return "config"
    if path in UMBRELLAS:
        return None
    return directory if directory in FLOORS else f"?{directory}"


def reachable_floors():
    below = {}

    def visit(floor):
        if floor not in below:
            below[floor] = {floor}.union(*(visit(next_floor) for next_floor in FLOORS[floor]))
        return below[floor]

    for floor in FLOORS:
        visit(floor)
    return below


def read_tree(root):
    return {
        str(path.relative_to(root)): path.read_text(encoding="utf-8")
        for path in sorted(root.rglob("*"))
        if path.suffix in {".hpp", ".cuh"}
    }


def includes_of(name, text):
    for number, line in enumerate(text.splitlines(), 1):
        match = re.match(r'\s*#\s*include\s*([<"])([^>"]+)[>"]', line)
        if match:
            yield Include(name, number, match.group(2) if match.group(1) == "<" else f'"{match.group(2)}"')


def is_standard(target):
    return re.fullmatch(r"[a-z0-9_]+", target) is not None


def is_definition(name):
    return name.endswith(("_impl.hpp", ".inc.hpp"))


def check_third_party(include):
    for pattern, owner in THIRD_PARTY.items():
        if re.match(pattern, include.target):
            if include.source not in {f"interop/{owner}.hpp", f"interop/{owner}_impl.hpp"}:
                yield f"<{include.target}> belongs to interop/{owner}.hpp"
            return
    if re.match(CUDA, include.target):
        if not include.source.endswith(".cuh"):
            yield f"<{include.target}> is CUDA: only a .cuh may include it"
    elif not is_standard(include.target) and not re.fullmatch(SYSTEM, include.target):
        yield f"<{include.target}> is neither standard nor known: add an owner in interop/ and a line here"


def check_own(include, tree, below):
    source, target = include.source, include.target.removeprefix("m2lm/")
    if target not in tree:
        yield f"<m2lm/{target}> does not exist"
        return
    if source.endswith(".hpp") and target.endswith(".cuh"):
        yield f"a .hpp includes the .cuh <m2lm/{target}>"
    source_floor, target_floor = floor_of(source), floor_of(target)
    if target.endswith("_impl.hpp") and not (source_floor is None or is_definition(source)):
        yield f"a declaration includes the definitions <m2lm/{target}>"
    owner = pathlib.PurePosixPath(target).stem.removesuffix("_impl")
    if target_floor == "interop" and owner in READERS and not (is_definition(source) or source_floor in {None, "interop"}):
        yield f"a declaration includes the reader <m2lm/{target}>"
    if target_floor == "interop" and owner in OPTIONAL and source not in ADDITIONS:
        yield f"the library includes <m2lm/{target}>, which is for those who ask for it"
    if source_floor is None:
        allowed = set().union(*(below[floor] for floor in UMBRELLAS[source]))
        if target_floor is not None and target_floor not in allowed:
            yield f"{source} may not include floor {target_floor} (<m2lm/{target}>)"
    elif target_floor is None:
        yield f"<m2lm/{target}> stands above every floor"
    elif source_floor in below and target_floor in below and target_floor not in below[source_floor]:
        yield f"floor {source_floor} may not include floor {target_floor} (<m2lm/{target}>)"


def check_header(name, text):
    floor = floor_of(name) or "m2lm"
    if floor.startswith("?"):
        yield f"{name}: no floor has the directory {floor[1:]}"
    opening = "\n".join(text.splitlines()[:5])
    if not name.endswith(".inc.hpp") and not re.search(rf"^// Floor: {floor}\b.*May include: .+", opening, re.MULTILINE):
        yield f"{name}: does not open with `// Floor: {floor}. May include: …`"
    if name != "config.hpp":
        for number, line in enumerate(text.splitlines(), 1):
            if re.match(r"\s*#\s*(el)?if.*\b(__GNUC__|__clang__|_MSC_VER)\b", line):
                yield f"{name}:{number}: tells compilers apart; config.hpp is the place for that"


def cycles(edges):
    """Each cycle once, as a list of headers that ends where it begins."""
    state, path = {}, []

    def visit(name):
        state[name] = "open"
        path.append(name)
        for target in edges.get(name, []):
            if state.get(target) == "open":
                yield path[path.index(target):] + [target]
            elif target not in state:
                yield from visit(target)
        path.pop()
        state[name] = "done"

    for name in sorted(edges):
        if name not in state:
            yield from visit(name)


def reached(edges, start):
    found, open_ends = {start}, [start]
    while open_ends:
        for target in edges.get(open_ends.pop(), []):
            if target not in found:
                found.add(target)
                open_ends.append(target)
    return found


def check_reach(tree, edges):
    """What the headers above all floors must reach, and what they must not."""
    for reader in sorted(READERS):
        if f"interop/{reader}.hpp" in reached(edges, "core.hpp"):
            yield f"core.hpp reaches the reader interop/{reader}.hpp"
    everything, definitions, device = (reached(edges, umbrella) for umbrella in ("m2lm.hpp", "impl.hpp", "m2lm.cuh"))
    for name in tree:
        if floor_of(name) in {"interop", "testing", None} or name.endswith(".inc.hpp") or name == "fwd.hpp":
            continue
        if name.endswith(".cuh") and name not in device:
            yield f"{name} is not reached from m2lm.cuh"
        if name.endswith("_impl.hpp") and name not in definitions:
            yield f"{name} is not reached from impl.hpp"
        if not name.endswith(("_impl.hpp", ".cuh")) and name not in everything | device:
            yield f"{name} is not reached from m2lm.hpp"


def check(root):
    """All that is wrong with the headers under `root` (an include/m2lm), as lines of text."""
    tree, below, edges = read_tree(root), reachable_floors(), {}
    problems = [] if tree else [f"{root}: no headers"]
    for name, text in tree.items():
        problems += check_header(name, text)
        for include in includes_of(name, text):
            where = f"{name}:{include.line}"
            if include.target.startswith('"'):
                problems.append(f"{where}: #include {include.target}: write <m2lm/…>")
            elif include.target.startswith("m2lm/"):
                problems += [f"{where}: {problem}" for problem in check_own(include, tree, below)]
                if not name.endswith(".inc.hpp"):
                    edges.setdefault(name, []).append(include.target.removeprefix("m2lm/"))
            else:
                problems += [f"{where}: {problem}" for problem in check_third_party(include)]
    problems += check_reach(tree, edges)
    problems += ["cycle: " + " -> ".join(cycle) for cycle in cycles(edges)]
    return problems


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("include_dir", type=pathlib.Path, help="the directory that holds m2lm/")
    problems = check(parser.parse_args().include_dir / "m2lm")
    print("\n".join(problems) if problems else "every include follows the floors")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

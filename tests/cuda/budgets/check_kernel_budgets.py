#!/usr/bin/env python3
"""What each kernel of the bf16 model takes of an sm_90 multiprocessor: registers, static shared memory, and no spills.

check_kernel_budgets.py BUDGETS OBJECT... --nvcc VERSION [--update]
check_kernel_budgets.py --self-test

OBJECT.ptxas is what record_ptxas.py kept while an object was built; those that nvcc did not build have none. A kernel that takes more than BUDGETS grants, that spills, or
that the table does not name, fails the test; --update writes the table. Another nvcc allocates otherwise: then the test is skipped.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys

SKIPPED = 77


def demangled(names):
    text = subprocess.run(["c++filt"], input="\n".join(names), stdout=subprocess.PIPE, text=True, check=True).stdout
    # The inline namespace of the version is no part of a name here.
    return [re.sub(r"^void |\(.*$|\bm2lm::(v\d+_\d+::)?(cuda::)?", "", line.replace("(anonymous namespace)::", "")) for line in text.splitlines()]


def kernels_of(text):
    """{mangled name: {registers, shared, spilled}}"""
    found = {}
    for part in re.split(r"Compiling entry function '", text)[1:]:
        name = part.partition("'")[0]
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", part)
        used = re.search(r"Used (\d+) registers(.*)", part)
        shared = re.search(r"(\d+) bytes smem", used.group(2))
        found[name] = {"registers": int(used.group(1)), "shared": int(shared.group(1)) if shared else 0,
                       "spilled": sum(map(int, spills))}
    return found


def problems_of(kernels, table):
    for name, used in sorted(kernels.items()):
        if used["spilled"]:
            yield f"{name} spills {used['spilled']} bytes"
        if name not in table:
            yield f"{name} is not in the table: registers {used['registers']}, shared {used['shared']}"
            continue
        for what in ("registers", "shared"):
            if used[what] > table[name][what]:
                yield f"{name} takes {what} {used[what]}, granted {table[name][what]}"
    for name in sorted(table.keys() - kernels.keys()):
        yield f"{name} is in the table and no longer compiled"


def self_test():
    """The parser and the judgement on text as nvcc 13.0 writes it."""
    text = ("ptxas info    : Compiling entry function '_Z1kv' for 'sm_90a'\n"
            "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
            "ptxas info    : Used 19 registers, used 1 barriers, 132 bytes smem\n"
            "ptxas info    : Compiling entry function '_Z1gv' for 'sm_90a'\n"
            "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
            "ptxas info    : Used 10 registers, used 0 barriers\n")
    assert demangled(["_ZN4m2lm4v0_14cuda1fINS0_4Bf16EEEvT_", "_ZN4m2lm4cuda1fINS_4Bf16EEEvT_"]) == ["f<Bf16>"] * 2
    kernels = kernels_of(text)
    assert kernels == {"_Z1kv": {"registers": 19, "shared": 132, "spilled": 16}, "_Z1gv": {"registers": 10, "shared": 0, "spilled": 0}}, kernels
    table = {"_Z1kv": {"registers": 18, "shared": 132}, "_Z1hv": {"registers": 1, "shared": 0}}
    problems = list(problems_of(kernels, table))
    assert len(problems) == 4, problems
    for piece in ("_Z1kv spills 16", "_Z1kv takes registers 19, granted 18", "_Z1gv is not in the table", "_Z1hv is in the table"):
        assert any(piece in problem for problem in problems), (piece, problems)
    print("the judgement of kernels is as it should be")


def main():
    if sys.argv[1:] == ["--self-test"]:
        return self_test()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("budgets", type=pathlib.Path)
    parser.add_argument("objects", nargs="+")
    parser.add_argument("--nvcc", required=True, help="version of the nvcc that built")
    parser.add_argument("--update", action="store_true")
    options = parser.parse_args()
    said = [pathlib.Path(name + ".ptxas") for name in options.objects]
    mangled = kernels_of("".join(path.read_text(encoding="utf-8") for path in said if path.exists()))
    kernels = dict(zip(demangled(mangled), mangled.values()))
    if len(kernels) != len(mangled) or not kernels:
        print(f"{len(mangled)} kernels have {len(kernels)} names")
        return 1
    if options.update:
        table = {name: {"registers": used["registers"], "shared": used["shared"]} for name, used in sorted(kernels.items())}
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(used)}" for name, used in table.items())
        options.budgets.write_text(f'{{\n  "nvcc": {json.dumps(options.nvcc)},\n  "kernels": {{\n{lines}\n  }}\n}}\n', encoding="utf-8")
    recorded = json.loads(options.budgets.read_text(encoding="utf-8"))
    if recorded["nvcc"] != options.nvcc:
        print(f"SKIPPED: the table is of nvcc {recorded['nvcc']}, this is {options.nvcc}")
        return SKIPPED
    problems = list(problems_of(kernels, recorded["kernels"]))
    print("\n".join(problems) if problems else f"{len(kernels)} kernels, none spills, none takes more than it is granted")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""How many instructions small fixed workloads take, against the table instructions.json.

callgrind counts them, at level avx2, which it knows on every machine that has it: a count depends neither on the clock nor on what
else runs. One that is more than `tolerance` away from the table fails, less too: then it is faster, and is recorded anew by
--update, so that the table does not leave room to rot. Counts belong to one version of the compiler and of the C library: with others
the test reports itself as skipped.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "support"))
import toolchain  # noqa: E402

TABLE = pathlib.Path(__file__).resolve().parent / "instructions.json"


def counted(valgrind, program, name):
    """Instructions of m2lm_counted_work in the workload `name`."""
    environment = dict(os.environ, M2LM_MAX_ISA="avx2")
    ran = subprocess.run([valgrind, "--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no",
                          "--toggle-collect=m2lm_counted_work", program, name],
                         capture_output=True, text=True, env=environment, check=False)
    if ran.returncode == toolchain.SKIPPED:
        toolchain.skip(ran.stdout.strip())
    total = re.search(r"Collected : (\d+)", ran.stderr)
    if ran.returncode != 0 or not total or total.group(1) == "0":
        raise RuntimeError(f"{name}: exit status {ran.returncode}\n{ran.stdout}{ran.stderr}")
    return int(total.group(1))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--valgrind", default="valgrind")
    parser.add_argument("--compiler", required=True, help="name and version of the compiler of the program")
    parser.add_argument("--update", action="store_true", help="record what is counted now")
    parser.add_argument("program")
    options = parser.parse_args()
    toolchain.compiler_or_skip(options.valgrind)

    table = json.loads(TABLE.read_text(encoding="utf-8"))
    versions = {"compiler": options.compiler, "libc": " ".join(platform.libc_ver())}
    if options.update:
        table["versions"] = versions
    elif versions != table["versions"]:
        toolchain.skip(f"the table was counted with {table['versions']}, this is {versions}")

    failed = 0
    for name, recorded in table["instructions"].items():
        count = counted(options.valgrind, options.program, name)
        ratio = count / recorded if recorded else 0
        wrong = abs(ratio - 1) > table["tolerance"] and not options.update
        failed += wrong
        print(f"{'FAILED' if wrong else 'ok    '} {name:12} {count:12,} instructions, {ratio:.3f} of the recorded {recorded:,}")
        if options.update:
            table["instructions"][name] = count
    if options.update:
        TABLE.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    elif failed:
        print("if it is meant to be so: `cmake --build build/dev --target record_instructions`")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Judges test programs that have a fault planted in them.

check_fault.py caught PROGRAM NUMBER  with that fault the program must run to its end and report a failure
check_fault.py passes PROGRAM         without a fault it must pass
check_fault.py table HEADER TABLE     every fault of faults.hpp is in faults.json, once and under its name, and is planted
                                      somewhere in the library: M2LM_FAULT(number)
"""

import json
import os
import pathlib
import re
import subprocess
import sys

LEAST_FAULTS = 20
SKIPPED = 77


def run(program, fault):
    result = subprocess.run([program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False,
                            env={**os.environ, "M2LM_PLANT_FAULT": fault})
    failed_cases = re.findall(r"^TEST CASE: +(.+)$", result.stdout, re.MULTILINE)
    if result.returncode == SKIPPED:
        print(result.stdout)
        sys.exit(SKIPPED)
    return result, failed_cases


def caught(program, fault):
    result, failed_cases = run(program, fault)
    if result.returncode == 0 or "[doctest] Status: FAILURE!" not in result.stdout:
        print(result.stdout)
        print(f"NOT CAUGHT (exit status {result.returncode})")
        return 1
    print("caught by: " + "; ".join(dict.fromkeys(failed_cases)))
    return 0


def passes(program):
    result, _ = run(program, "0")
    if result.returncode != 0:
        print(result.stdout)
        print(f"without a fault the program should pass; its exit status is {result.returncode}")
        return 1
    return 0


def table(header, table_file):
    text = pathlib.Path(header).read_text(encoding="utf-8")
    named = {int(number): name for name, number in re.findall(r"\b(\w+)\s*=\s*(\d+)\b", text)}
    entries = json.loads(pathlib.Path(table_file).read_text(encoding="utf-8"))
    listed = {entry["number"]: entry["name"] for entry in entries}
    problems = [f"fault {number}: faults.hpp says {named.get(number)}, faults.json says {listed.get(number)}"
                for number in sorted(named.keys() | listed.keys()) if named.get(number) != listed.get(number)]
    root = pathlib.Path(header).parents[1]
    planted = {int(number) for path in root.rglob("*") if path.suffix in {".hpp", ".cuh"} and path != pathlib.Path(header)
               for number in re.findall(r"\bM2LM_FAULT\((\d+)\)", path.read_text(encoding="utf-8"))}
    problems += [f"fault {number}: {'listed but not planted' if number in listed else 'planted but not listed'}"
                 for number in sorted(planted ^ listed.keys())]
    if len(listed) != len(entries):
        problems.append("faults.json has a number twice")
    if len(listed) < LEAST_FAULTS:
        problems.append(f"{len(listed)} faults; there should be {LEAST_FAULTS} or more")
    print("\n".join(problems) if problems else f"{len(listed)} faults, each with the program that must catch it")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit({"caught": caught, "passes": passes, "table": table}[sys.argv[1]](*sys.argv[2:]))

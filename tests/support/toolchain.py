"""What the scripts that call a compiler share: its flags, running several at once, and how a test says it was skipped."""

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys

STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"]
SKIPPED = 77  # ctest's SKIP_RETURN_CODE


def arguments(description):
    """A parser with the options that tests/CMakeLists.txt passes to every such script."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--gcc", default="g++")
    parser.add_argument("--clang", default="clang++")
    parser.add_argument("--flags-file", required=True, help="include flags of m2lm::m2lm, one per line")
    return parser


def add_compiler_choice(parser):
    parser.add_argument("--compiler", choices=["gcc", "clang"], required=True)


def chosen_compiler(options):
    return compiler_or_skip(options.gcc if options.compiler == "gcc" else options.clang)


def compiler_or_skip(path):
    if not path or path.endswith("-NOTFOUND"):
        skip("compiler not found")
    return path


def skip(reason):
    print(f"SKIPPED: {reason}")
    sys.exit(SKIPPED)


def read_flags(path):
    with open(path, encoding="utf-8") as file:
        return [line for line in file.read().split("\n") if line]


def run(command, **kwargs):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **kwargs)


def in_parallel(function, items):
    """[function(item) ...] in order, by as many threads as ctest or the machine gives."""
    jobs = int(os.environ.get("M2LM_TEST_JOBS", "1"))
    with concurrent.futures.ThreadPoolExecutor(max_workers=jobs) as pool:
        return list(pool.map(function, items))


def first_errors(output, count=8):
    lines = [line for line in output.splitlines() if re.search(r"\berror:|required from|instantiation of", line)]
    return "\n".join("    " + line for line in (lines or output.splitlines())[:count])

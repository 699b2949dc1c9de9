#!/usr/bin/env python3
"""The first program of README.md compiles as printed, header-only and without a warning, runs, and says something."""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "support"))
import toolchain  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]


def first_program(markdown):
    for block in re.findall(r"^```cpp\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL):
        if "int main" in block:
            return block
    return None


def main():
    parser = toolchain.arguments(__doc__)
    toolchain.add_compiler_choice(parser)
    parser.add_argument("--library", action="append", default=[], help="a library to link")
    options = parser.parse_args()
    compiler = toolchain.chosen_compiler(options)

    program = first_program((ROOT / "README.md").read_text(encoding="utf-8"))
    if program is None:
        print("README.md has no ```cpp block with a main function")
        return 1
    with tempfile.TemporaryDirectory() as directory:
        source, executable = pathlib.Path(directory, "readme.cpp"), pathlib.Path(directory, "readme")
        source.write_text(program, encoding="utf-8")
        built = toolchain.run([compiler, *toolchain.read_flags(options.flags_file), *toolchain.STRICT, "-O2", str(source),
                               "-o", str(executable), *options.library])
        if built.returncode != 0:
            print(f"the program of README.md does not compile with {compiler}:\n{toolchain.first_errors(built.stdout)}")
            return 1
        ran = subprocess.run([str(executable)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    print(f"stdout: {ran.stdout.strip()}\nstderr: {ran.stderr.strip()}\nexit status: {ran.returncode}")
    return 0 if ran.returncode == 0 and ran.stdout.strip() else 1


if __name__ == "__main__":
    sys.exit(main())

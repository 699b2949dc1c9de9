#!/usr/bin/env python3
"""A program that g++ or clang++ compiles links the model that m2lm_instantiate made, and does not compile its members again."""

import os
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "support"))
import toolchain  # noqa: E402


def main():
    parser = toolchain.arguments(__doc__)
    toolchain.add_compiler_choice(parser)
    parser.add_argument("--source-dir", type=pathlib.Path, required=True)
    parser.add_argument("--work-dir", type=pathlib.Path, required=True)
    parser.add_argument("libraries", nargs="+")
    options = parser.parse_args()
    compiler = toolchain.chosen_compiler(options)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    unit, program = options.work_dir / "main.o", options.work_dir / "main"
    flags = [*toolchain.read_flags(options.flags_file), *toolchain.STRICT, "-O1", "-DM2LM_SEPARATE_IMPL=1", f"-I{options.source_dir / 'examples'}"]
    rpaths = {f"-Wl,-rpath,{os.path.dirname(library)}" for library in options.libraries if ".so" in library}
    for command in ([compiler, *flags, "-c", options.source_dir / "tests/cuda/link/main.cpp", "-o", unit],
                    [compiler, unit, *options.libraries, *sorted(rpaths), "-pthread", "-o", program]):
        result = toolchain.run([str(word) for word in command])
        if result.returncode != 0:
            print(result.stdout[-4000:])
            return 1
    members = re.findall(r"^ *\w* ([A-Zu]) (.*m2lm::v\d+_\d+::(?:Model|BasicSession)<.*>::(?:from_pretrained|generate|answer|prefill|load)\(.*)$",
                         toolchain.run(["nm", "-C", str(unit)]).stdout, re.MULTILINE)
    again = [name for kind, name in members if kind in "TWVu"]
    if again or not members:
        print("compiled again: " + "\n".join(again) if members else "main.o names no member of a model: does the expression still fit what nm prints?")
        return 1
    result = toolchain.run([str(program)])
    print(result.stdout)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())

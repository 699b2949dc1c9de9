#!/usr/bin/env python3
"""No instruction of a higher level outside that level's namespace, in object files that were compiled without -march.

An inline function that a target region compiles by accident would be merged by the linker with the same function of other
files, and stop a machine that lacks the instruction. Reads the disassembly: VEX code only in functions of cpu_avx2 and above,
AVX-512 registers only in those of cpu_avx512*.
"""

import re
import subprocess
import sys

AVX512 = re.compile(r"%zmm|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b")
VEX = re.compile(r"\t(v(?!err\b|erw\b)[a-z]\w+|andn|bextr|bls\w+|bzhi|mulx|pdep|pext|rorx|s[ahr][lr]x)\b")


def allowed(function):
    if "cpu_avx512" in function:
        return None
    return AVX512 if "cpu_avx2" in function else VEX


def leaks(objects):
    listing = subprocess.run(["objdump", "--disassemble", "--no-show-raw-insn", *objects], capture_output=True, text=True, check=True)
    function, seen = "", False
    for line in listing.stdout.splitlines():
        header = re.match(r"[0-9a-f]+ <(.+)>:$", line)
        if header:
            function = header.group(1)
            seen = seen or "cpu_avx" in function
        else:
            forbidden = allowed(function)
            if forbidden and forbidden.search(line):
                yield function, line.split("\t", 1)[-1].strip()
    if not seen:
        yield "no function of a higher level at all", "is the library in these files?"


def main():
    found = {}
    for function, instruction in leaks(sys.argv[1:]):
        found.setdefault(function, instruction)
    for function, instruction in found.items():
        print(f"FAILED: {function}: {instruction}")
    print(f"{len(found)} functions with instructions above their level")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

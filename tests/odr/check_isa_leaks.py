#!/usr/bin/env python3
"""No instruction of a higher level outside that level's namespace, in files that were compiled without -march.

An inline function that a target region compiles by accident would be merged by the linker with the same function of other
files, and stop a machine that lacks the instruction. Reads the disassembly: VEX code only in functions of cpu_avx2 and above,
AVX-512 registers only in those of cpu_avx512*, tiles only in those of an `amx` inside it. Give it linked programs: objdump takes a
minute for one large unlinked file.
"""

import re
import subprocess
import sys

AVX512_REGISTER = re.compile(r"%zmm|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b")
TILE = re.compile(r"^(tile|tdp|ldtile|sttile)")
BMI = {"andn", "bextr", "blsi", "blsmsk", "blsr", "bzhi", "mulx", "pdep", "pext", "rorx", "sarx", "shlx", "shrx"}


def is_vex(instruction):
    mnemonic = instruction.partition(" ")[0]
    return (mnemonic[0] == "v" and mnemonic not in {"verr", "verw"}) or mnemonic.rstrip("lq") in BMI


def is_avx512(instruction):
    return AVX512_REGISTER.search(instruction) is not None


def is_tile(instruction):
    return TILE.match(instruction) is not None


def is_vex_or_tile(instruction):
    return is_vex(instruction) or is_tile(instruction)


def is_avx512_or_tile(instruction):
    return is_avx512(instruction) or is_tile(instruction)


def leaks(objects):
    """Pairs of a function and an instruction that it must not have."""
    listing = subprocess.run(["objdump", "--disassemble", "--no-show-raw-insn", *objects], capture_output=True, text=True, check=True)
    function, forbidden, seen = "", is_vex_or_tile, False
    for line in listing.stdout.splitlines():
        if line.startswith(" "):  # "  address:\tinstruction"
            instruction = line.partition("\t")[2]
            if forbidden and instruction and forbidden(instruction):
                yield function, instruction.strip()
        elif line.endswith(">:"):  # "address <function>:"
            function = line.partition("<")[2][:-2]
            forbidden = is_vex_or_tile
            if "cpu_avx2" in function:
                forbidden = is_avx512_or_tile
            if "cpu_avx512" in function:
                forbidden = None if "3amx" in function else is_tile
            seen = seen or "cpu_avx" in function
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

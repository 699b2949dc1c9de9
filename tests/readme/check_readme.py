#!/usr/bin/env python3
"""The first program of README.md compiles as printed, header-only and without a warning, runs, and says something. Every other block of C++ in
the documents is part of a source that is compiled anyway, or compiles here: as printed, or, without an #include, as
members of a class or statements about a Vlm. Every block says its language, so that none of C++ is overlooked."""

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


PRELUDE = """#include <m2lm/m2lm.hpp>
using Vlm = m2lm::Model<m2lm::Cpu, m2lm::Precision{}, m2lm::LlamaDecoder<>, m2lm::Modality<"image", m2lm::ClipVit<>, m2lm::MlpProjector<2>>>;
"""
COMPILED = ("examples/*.cpp", "tests/seams/*.hpp", "tests/unit/*.cpp", "include/m2lm/**/*.hpp")


def words(text):
    """Without the line breaks and the indentation, which differ between a document and a source."""
    return " ".join(text.split())


DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
LANGUAGES = {"cpp", "cmake", "sh", "text", "mermaid"}  # blocks in cmake are configured by packaging.find_package and packaging.cuda


def blocks_without_language():
    """Lines that open a block of another language, of none, or where the expressions here do not look for it."""
    for document in DOCUMENTS:
        inside = False
        for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1):
            if line.lstrip().startswith(("```", "~~~")):
                inside = not inside
                if inside and line.removeprefix("```") not in LANGUAGES:
                    yield f"{document.relative_to(ROOT)}:{number}: {line}"


def other_blocks():
    """[(document, block)] of the blocks that no compiled source holds."""
    compiled = [words(path.read_text(encoding="utf-8")) for pattern in COMPILED for path in sorted(ROOT.glob(pattern))]
    for document in DOCUMENTS:
        for block in re.findall(r"^```cpp\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            if not any(words(block) in source for source in compiled):
                yield document.relative_to(ROOT), block


def check_blocks(compiler, options):
    """One file of all of them, which is not linked."""
    source, names = PRELUDE, []
    for i, (document, block) in enumerate(other_blocks()):
        if "int main" in block:
            continue  # README's, which is compiled and run
        names.append(str(document))
        if "#include" not in block:  # members of a class, or statements
            around = f"struct Shown{i} {{" if block.startswith("template") else f"[[maybe_unused]] static void shown{i}() {{"
            block = f"{around}\n{block}}};\n"
        source += f'#line 1 "{document} (block {i})"\n{block}'
    flags = [flag for flag in toolchain.STRICT if flag != "-Wshadow"] + ["-Wno-unused-variable", "-Wno-unused-but-set-variable"]
    result = toolchain.run([compiler, *toolchain.read_flags(options.flags_file), *flags, "-DM2LM_SEPARATE_IMPL=1", "-fsyntax-only", "-x", "c++", "-"], input=source)
    print(f"{len(names)} blocks that are in no source: {', '.join(names)}")
    if result.returncode != 0:
        print(f"they do not compile with {compiler}:\n{toolchain.first_errors(result.stdout)}")
    return result.returncode == 0


def main():
    parser = toolchain.arguments(__doc__)
    toolchain.add_compiler_choice(parser)
    parser.add_argument("--library", action="append", default=[], help="a library to link")
    options = parser.parse_args()
    compiler = toolchain.chosen_compiler(options)

    unknown = list(blocks_without_language())
    if unknown:
        print(f"a block begins with ``` and one of {sorted(LANGUAGES)}:\n" + "\n".join(unknown))
        return 1
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
    return 0 if ran.returncode == 0 and ran.stdout.strip() and check_blocks(compiler, options) else 1


if __name__ == "__main__":
    sys.exit(main())

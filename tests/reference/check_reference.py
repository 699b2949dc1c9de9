#!/usr/bin/env python3
"""Doxygen makes the API reference from docs/Doxyfile, and every public name in it says what it is.

A public name is a type, function, variable, alias, concept or enumeration of a namespace that docs/reference.dox describes. Not asked for are
specialisations (ops::Impl<Op, Backend> is described by its op, dtype_of<float> by dtype_of) and members, which are described where their
name and their class do not say it.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys

SKIPPED = 77
ROOT = pathlib.Path(__file__).resolve().parents[2]


def undocumented(warnings, namespaces):
    for line in sorted(set(warnings.splitlines())):
        member = re.search(r"Member (.+) \(\w+\) of namespace (\S+) is not documented", line)
        compound = re.search(r"Compound (\S+)::([^:]+) is not documented", line)
        if member and member.group(2) in namespaces:
            # Doxygen 1.9 takes the handler of a function-try-block for a function; `name< T >` is a specialisation.
            if not re.match(r"catch\(|[\w:]+< ", member.group(1)):
                yield line
        elif compound and compound.group(1) in namespaces and "<" not in compound.group(2):
            yield line


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=pathlib.Path, required=True)
    options = parser.parse_args()
    if not shutil.which("doxygen"):
        print("SKIPPED: no doxygen")
        return SKIPPED
    options.output_dir.mkdir(parents=True, exist_ok=True)
    namespaces = set(re.findall(r"^namespace (\S+) \{\}", (ROOT / "docs" / "reference.dox").read_text(encoding="utf-8"), re.MULTILINE))
    settings = (ROOT / "docs" / "Doxyfile").read_text(encoding="utf-8") + f'OUTPUT_DIRECTORY = "{options.output_dir}"\n'
    result = subprocess.run(["doxygen", "-"], cwd=ROOT, input=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    pages = list((options.output_dir / "html").glob("classm2lm_*.html"))
    problems = list(undocumented(result.stdout, namespaces))
    if result.returncode != 0 or len(pages) < 30 or not namespaces:
        problems.append(f"doxygen gave {len(pages)} pages of classes and exit status {result.returncode}:\n{result.stdout[-2000:]}")
    print("\n".join(problems) if problems else f"{len(pages)} classes; every public name of {', '.join(sorted(namespaces))} is documented")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Doxygen makes the API reference from docs/Doxyfile, and every public name in it says what it is.

A public name is
- a type, function, variable, alias, concept or enumeration of a namespace that docs/reference.dox describes,
- a public member function or member type of a class or struct there,
- a field of a struct that programs fill in or read: those whose name ends as FILLED_IN says.
Not asked for are specialisations (ops::Impl<Op, Backend> is described by its op, dtype_of<float> by dtype_of), special members, comparisons
and arithmetic, and the members that mean the same in every class: docs/reference.dox describes them once, in its list "In every class".
Any other warning of Doxygen is an error too.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys

SKIPPED = 77
ROOT = pathlib.Path(__file__).resolve().parents[2]
FILLED_IN = re.compile(r"(Options|Config|Limits|Policy|Precision|Facts|Report|Stats|Timings|Generation|Message|Score|Schedule|Selection|Image|ChatTemplate)$")
OPERATOR = re.compile(r"operator *([-+*/]?=|==|!=|<=>|[-+*/<>])\(")
SPECIAL = re.compile(r"~|.*\)( noexcept)? *=(default|delete)$")


def described_once(text):
    """The names in the list "In every class" of reference.dox."""
    return set(re.findall(r"^/// - `(\w+)`", text.partition("@section everywhere")[2], re.MULTILINE))


def line_of(warning):
    """The line of the source that a warning is about."""
    path, number = re.match(r"(.+?):(\d+): ", warning).groups()
    return pathlib.Path(path).read_text(encoding="utf-8").splitlines()[int(number) - 1]


def undocumented(warnings, namespaces, everywhere):
    for line in sorted(set(warnings.splitlines())):
        found = re.search(r"Member (.+) \((\w+)\) of (namespace|class|struct) (.+) is not documented", line)
        compound = re.search(r"Compound (\S+)::([^:]+) is not documented", line)
        if found and found.group(3) == "namespace":
            # Doxygen 1.9 takes the handler of a function-try-block for a function; `name< T >` is a specialisation.
            if found.group(4) in namespaces and not re.match(r"catch\(|[\w:]+< ", found.group(1)):
                yield line
        elif found:
            member, kind, _, owner = found.groups()
            # A private member that is defined outside its class: Doxygen 1.9 forgets that it is private.
            if f"{owner.rpartition('::')[2]}<M>::" in line_of(line):
                continue
            if owner.startswith("m2lm::ops::Impl") or not any(re.match(rf"{space}::[A-Z]", owner) for space in namespaces):
                continue
            if kind == "variable" and not FILLED_IN.search(owner):
                continue
            name = re.match(r"(~?[\w ]+)", member).group(1)
            if kind != "friend" and name not in everywhere and not OPERATOR.match(member) and not SPECIAL.match(member):
                yield line
        elif compound and compound.group(1).partition("::")[0] == "m2lm" and "<" not in compound.group(2):
            inside = compound.group(1) in namespaces or any(re.match(rf"{space}::[A-Z]", compound.group(1)) for space in namespaces)
            if inside and compound.group(2) not in everywhere and "Impl<" not in line:
                yield line
        elif "warning:" in line and "is not documented" not in line:
            yield line  # a docstring that Doxygen does not understand


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=pathlib.Path, required=True)
    options = parser.parse_args()
    if not shutil.which("doxygen"):
        print("SKIPPED: no doxygen")
        return SKIPPED
    options.output_dir.mkdir(parents=True, exist_ok=True)
    described = (ROOT / "docs" / "reference.dox").read_text(encoding="utf-8")
    namespaces = set(re.findall(r"^namespace (\S+) \{\}", described, re.MULTILINE))
    settings = (ROOT / "docs" / "Doxyfile").read_text(encoding="utf-8") + f'OUTPUT_DIRECTORY = "{options.output_dir}"\n'
    result = subprocess.run(["doxygen", "-"], cwd=ROOT, input=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    pages = list((options.output_dir / "html").glob("classm2lm_*.html"))
    problems = list(undocumented(result.stdout, namespaces, described_once(described)))
    if result.returncode != 0 or len(pages) < 30 or not namespaces:
        problems.append(f"doxygen gave {len(pages)} pages of classes and exit status {result.returncode}:\n{result.stdout[-2000:]}")
    print("\n".join(problems) if problems else f"{len(pages)} classes; every public name of {', '.join(sorted(namespaces))} is documented")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

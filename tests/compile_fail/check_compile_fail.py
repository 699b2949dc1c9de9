#!/usr/bin/env python3
"""Wrong programs are refused with the library's own sentence.

Each tests/compile_fail/NAME.cpp starts with a line `// expect: REGEX`. It is compiled twice: with -DM2LM_MUST_FAIL, which
must fail with a static_assert (or deleted function, or constraint) whose line matches REGEX, and without, which must
compile without a warning: so the one difference between the two is what is refused. A file that does not use
M2LM_MUST_FAIL has the correct program in NAME_ok.cpp.
"""

import os
import pathlib
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "support"))
import toolchain  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent


def check(path, command):
    """None, or what is wrong with the pair of programs in `path`."""
    text = path.read_text(encoding="utf-8")
    expected = re.match(r"// expect: (.+)", text)
    if not expected:
        return "the first line is not `// expect: REGEX`"
    sibling = path.with_name(path.stem + "_ok.cpp")
    if "M2LM_MUST_FAIL" in text:
        sibling = path
    elif not sibling.exists():
        return f"it neither uses M2LM_MUST_FAIL nor has a sibling {sibling.name} that compiles"

    good = toolchain.run([*command, str(sibling)])
    if good.returncode != 0:
        return f"the correct program {sibling.name} does not compile:\n{toolchain.first_errors(good.stdout)}"
    bad = toolchain.run([*command, "-DM2LM_MUST_FAIL", str(path)])
    if bad.returncode == 0:
        return "the wrong program compiles"
    errors = [line for line in bad.stdout.splitlines() if "error:" in line]
    if not any(re.search(expected.group(1), line) for line in errors):
        return f"no error matches /{expected.group(1)}/:\n{toolchain.first_errors(bad.stdout)}"
    return None


def main():
    parser = toolchain.arguments(__doc__)
    toolchain.add_compiler_choice(parser)
    parser.add_argument("files", nargs="*", type=pathlib.Path, help="check these only")
    options = parser.parse_args()
    compiler = toolchain.chosen_compiler(options)
    command = [compiler, *toolchain.read_flags(options.flags_file), *toolchain.STRICT, "-DM2LM_SEPARATE_IMPL=1", "-fsyntax-only"]

    files = options.files or sorted(path for path in HERE.glob("*.cpp") if not path.stem.endswith("_ok"))
    failed = 0
    for path, problem in zip(files, toolchain.in_parallel(lambda file: check(file, command), files)):
        failed += problem is not None
        print(f"{'FAILED' if problem else 'ok    '} {path.name}{': ' + problem if problem else ''}")
    print(f"{len(files) - failed} of {len(files)} wrong programs refused as expected by {compiler}")
    return 1 if failed or not files else 0


if __name__ == "__main__":
    sys.exit(main())

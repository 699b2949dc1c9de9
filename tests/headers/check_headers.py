#!/usr/bin/env python3
"""Every public header compiles alone, twice in one file, and without a warning.

Bodies that are included several times on purpose (*.inc.hpp) are no headers of their own and are left out.
"""

import os
import pathlib
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "support"))
import toolchain  # noqa: E402


def main():
    parser = toolchain.arguments(__doc__)
    toolchain.add_compiler_choice(parser)
    parser.add_argument("--include-dir", type=pathlib.Path, required=True)
    parser.add_argument("headers", nargs="*", help="check these only, named as in #include")
    options = parser.parse_args()
    compiler = toolchain.chosen_compiler(options)
    command = [compiler, *toolchain.read_flags(options.flags_file), *toolchain.STRICT, "-fsyntax-only", "-x", "c++", "-"]

    headers = options.headers or sorted(
        str(path.relative_to(options.include_dir))
        for path in options.include_dir.rglob("*.hpp")
        if not path.name.endswith(".inc.hpp"))

    def check(header):
        return toolchain.run(command, input=f"#include <{header}>\n#include <{header}>\n")

    failed = 0
    for header, result in zip(headers, toolchain.in_parallel(check, headers)):
        if result.returncode != 0:
            failed += 1
            print(f"FAILED <{header}>\n{toolchain.first_errors(result.stdout)}")
    print(f"{len(headers) - failed} of {len(headers)} headers compile alone with {compiler}")
    return 1 if failed or not headers else 0


if __name__ == "__main__":
    sys.exit(main())

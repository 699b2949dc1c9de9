#!/usr/bin/env python3
"""What including the library costs a compiler, against the table budget.json.

For each probe: preprocessed lines (g++ -E), class and function template instantiations (clang's time trace, which counts the
same on every run), and peak memory of g++ -O2. `limits` are promises to users and are never raised by --update; `recorded`
is the last measurement, which may be exceeded by the table's tolerances only. Times are printed, never judged.
For each public header: preprocessed lines, which its own #include lines decide (`headers`).
Counts belong to one version of a compiler: with another the test reports itself as skipped.
"""

import json
import os
import pathlib
import re
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "support"))
import toolchain  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
TABLE = HERE / "budget.json"


def version(compiler):
    return re.search(r"\d+\.\d+\.\d+", toolchain.run([compiler, "--version"]).stdout).group(0)


def run_or_fail(command):
    """Runs a compiler; its output, peak memory in MB and seconds of processor time."""
    read_end, write_end = os.pipe()
    child = os.posix_spawnp(command[0], command, os.environ, file_actions=[
        (os.POSIX_SPAWN_DUP2, write_end, 1), (os.POSIX_SPAWN_DUP2, write_end, 2), (os.POSIX_SPAWN_CLOSE, read_end)])
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        output = pipe.read().decode(errors="replace")
    # The usage of the driver includes that of the compiler proper, which it waited for.
    _, status, usage = os.wait4(child, 0)
    if status != 0:
        raise RuntimeError(f"{' '.join(command)}\n{toolchain.first_errors(output)}")
    return output, usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


def probe_source(name, probe, directory):
    if "file" in probe:
        return HERE / probe["file"]
    source = pathlib.Path(directory, name + ".cpp")
    source.write_text("".join(f"#include <{header}>\n" for header in probe["include"]), encoding="utf-8")
    return source


def measure(name, probe, flags, gcc, clang):
    with tempfile.TemporaryDirectory() as directory:
        source = str(probe_source(name, probe, directory))
        flags = flags + [f"-D{macro}" for macro in probe.get("define", [])]
        preprocessed, _, _ = run_or_fail([gcc, *flags, "-E", source])
        lines = sum(1 for line in preprocessed.splitlines() if not line.startswith("#"))
        _, memory, seconds = run_or_fail([gcc, *flags, "-O2", "-c", source, "-o", f"{directory}/gcc.o"])
        run_or_fail([clang, *flags, "-O0", "-ftime-trace", "-ftime-trace-granularity=0", "-c", source, "-o", f"{directory}/clang.o"])
        trace = json.loads(pathlib.Path(directory, "clang.json").read_text(encoding="utf-8"))["traceEvents"]
    counts = {kind: sum(1 for event in trace if event["name"] == kind) for kind in ("InstantiateClass", "InstantiateFunction")}
    measured = {"lines": lines, "classes": counts["InstantiateClass"], "functions": counts["InstantiateFunction"],
                "memory_mb": round(memory)}
    return measured, seconds


def public_headers():
    include = HERE.parents[1] / "include"
    names = sorted(str(path.relative_to(include)) for path in include.rglob("*.hpp"))
    return [name for name in names if not name.endswith(("_impl.hpp", ".inc.hpp", "m2lm/impl.hpp"))]


def check_headers(table, flags, gcc, update):
    """The number of headers over their budget."""

    def lines(header):
        result = toolchain.run([gcc, *flags, "-E", "-P", "-x", "c++", "-"], input=f"#include <{header}>\n")
        return sum(1 for line in result.stdout.splitlines() if line.strip()) if result.returncode == 0 else None

    headers, failed = public_headers(), 0
    measured = dict(zip(headers, toolchain.in_parallel(lines, headers)))
    if update:
        table["headers"] = measured
    for header, value in measured.items():
        recorded = table["headers"].get(header)
        problem = ("cannot be preprocessed" if value is None else "nothing recorded yet: run with --update" if recorded is None else
                   f"{value} lines are more than {table['tolerance']['header_lines']:.0%} above the recorded {recorded}"
                   if value > recorded * (1 + table["tolerance"]["header_lines"]) else None)
        if problem:
            failed += 1
            print(f"FAILED: <{header}>: {problem}")
    for header in sorted(set(table["headers"]) - set(headers)):
        failed += 1
        print(f"FAILED: <{header}> is recorded, and is no more: run with --update")
    print(f"{len(headers)} public headers, the longest {max(measured, key=lambda name: measured[name] or 0)}")
    return failed


def excesses(measured, probe, tolerance):
    for what, value in measured.items():
        limit = probe.get("limits", {}).get(what)
        if limit is not None and value > limit:
            yield f"{what} {value} is above the limit {limit}"
        recorded = probe.get("recorded", {}).get(what)
        if recorded is not None and value > recorded * (1 + tolerance[what]):
            yield f"{what} {value} is more than {tolerance[what]:.0%} above the recorded {recorded}"


def main():
    parser = toolchain.arguments(__doc__)
    parser.add_argument("--update", action="store_true", help="record what is measured now")
    parser.add_argument("probes", nargs="*", help="measure these only (and no public header)")
    options = parser.parse_args()
    gcc, clang = toolchain.compiler_or_skip(options.gcc), toolchain.compiler_or_skip(options.clang)
    table = json.loads(TABLE.read_text(encoding="utf-8"))

    versions = {"gcc": version(gcc), "clang": version(clang)}
    if options.update:
        table["compilers"] = versions
    elif versions != table["compilers"]:
        toolchain.skip(f"the table was measured with {table['compilers']}, this is {versions}")

    failed = 0
    flags = toolchain.read_flags(options.flags_file)
    print(f"{'probe':28} {'lines':>8} {'classes':>8} {'functions':>9} {'MB':>5} {'s':>6}")
    for name in options.probes or table["probes"]:
        probe, begin = table["probes"][name], time.monotonic()
        try:
            measured, seconds = measure(name, probe, flags, gcc, clang)
        except RuntimeError as error:
            failed += 1
            print(f"{name:28} FAILED: does not compile: {error}")
            continue
        print(f"{name:28} {measured['lines']:8} {measured['classes']:8} {measured['functions']:9} {measured['memory_mb']:5}"
              f" {seconds:6.2f}  ({time.monotonic() - begin:.1f} s for all measurements)")
        if options.update:
            probe["recorded"] = measured
        elif "recorded" not in probe:
            failed += 1
            print(f"{'':28} FAILED: nothing recorded yet: run with --update")
        for problem in excesses(measured, probe, table["tolerance"]):
            failed += 1
            print(f"{'':28} FAILED: {problem}")
    if not options.probes:
        failed += check_headers(table, flags, gcc, options.update)
    if options.update:
        TABLE.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

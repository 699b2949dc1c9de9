#!/usr/bin/env python3
"""The project on a machine without CUDA, which this one is made to look like: no nvcc is found, no toolkit, no environment says where.

It configures, says so, compiles nothing with nvcc, knows no CUDA directory, and registers the tests of the device as one that is skipped.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys

HINTS = ("CUDACXX", "CUDA_PATH", "CUDA_HOME", "CUDAToolkit_ROOT", "CPATH", "CPLUS_INCLUDE_PATH")


def nvcc_directories():
    places = [pathlib.Path(place) for place in os.environ.get("PATH", "").split(os.pathsep) if place]
    places += [pathlib.Path(os.environ[hint]) / "bin" for hint in HINTS if hint in os.environ]
    places += [pathlib.Path("/usr/local/cuda/bin"), pathlib.Path("/opt/cuda/bin")]
    return [str(place) for place in dict.fromkeys(places) if (place / "nvcc").exists()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source-dir", type=pathlib.Path, required=True)
    parser.add_argument("--work-dir", type=pathlib.Path, required=True, help="emptied first")
    parser.add_argument("--cmake", default="cmake")
    options = parser.parse_args()
    shutil.rmtree(options.work_dir, ignore_errors=True)
    hidden = nvcc_directories()
    environment = {name: value for name, value in os.environ.items() if name not in HINTS}
    environment["PATH"] = os.pathsep.join(place for place in environment["PATH"].split(os.pathsep)
                                          if place not in hidden or (pathlib.Path(place) / "g++").exists())
    configured = subprocess.run(
        [options.cmake, "--preset", "dev", "-S", options.source_dir, "-B", options.work_dir, f"-DCMAKE_IGNORE_PATH={';'.join(hidden)}",
         "-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment, cwd=options.source_dir)
    problems = []
    if configured.returncode != 0:
        problems.append("it does not configure:\n" + configured.stdout[-3000:])
    else:
        if "No nvcc found" not in configured.stdout:
            problems.append("it does not say that no nvcc was found")
        for entry in json.loads((options.work_dir / "compile_commands.json").read_text(encoding="utf-8")):
            command = entry["command"]
            if "nvcc" in command or "M2LM_PROGRAMS_HAVE_CUDA" in command or "/cuda/include" in command or entry["file"].endswith(".cu"):
                problems.append(f"{entry['file']}: {command}")
        ctest = pathlib.Path(shutil.which(options.cmake)).with_name("ctest")
        tested = subprocess.run([ctest, "--test-dir", options.work_dir,
                                 "-R", r"^cuda\.device", "--no-tests=error"],
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment)
        if tested.returncode != 0 or tested.stdout.count("***Skipped") != 1:
            problems.append("the tests of the device are not one skipped test:\n" + tested.stdout)
    print("\n".join(problems) if problems else f"configured without CUDA (hidden: {', '.join(hidden) or 'nothing'})")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

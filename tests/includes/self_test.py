#!/usr/bin/env python3
"""check_includes.py accepts a good tree and names each kind of fault in a bad one."""

import pathlib
import sys
import tempfile

import check_includes

GOOD = {
    "version.hpp": ("config", ""),
    "config.hpp": ("config", "#include <m2lm/version.hpp>\n#if defined(__clang__)\n#endif\n"),
    "core/view.hpp": ("core", "#include <m2lm/config.hpp>\n#include <vector>\n"),
    "ops/linear.hpp": ("ops", "#include <m2lm/core/view.hpp>\n"),
    "interop/eigen.hpp": ("interop", "#include <Eigen/Core>\n"),
    "interop/xtensor.hpp": ("interop", "#include <xtensor/xarray.hpp>\n"),
    "interop/json.hpp": ("interop", "#include <nlohmann/json.hpp>\n"),
    "interop/stb.hpp": ("interop", "#include <stb_image.h>\n"),
    "backends/cpu/cpu.hpp": ("backends", "#include <m2lm/ops/linear.hpp>\n#include <m2lm/interop/eigen.hpp>\n"),
    "backends/cpu/cpu_impl.hpp": ("backends", "#include <m2lm/backends/cpu/cpu.hpp>\n#include <immintrin.h>\n"
                                              "#include <m2lm/backends/cpu/kernels/gemm.inc.hpp>\n"),
    "backends/cpu/kernels/gemm.inc.hpp": ("backends", "#include <m2lm/backends/cpu/cpu_impl.hpp>\n"),
    "backends/cuda/gemm.cuh": ("backends", "#include <cublasLt.h>\n#include <m2lm/ops/linear.hpp>\n"),
    "layers/linear.hpp": ("layers", "#include <m2lm/ops/linear.hpp>\n"),
    "parts/decoders/llama.hpp": ("parts", "#include <m2lm/layers/linear.hpp>\n"),
    "io/config.hpp": ("io", "#include <m2lm/core/view.hpp>\n"),
    "io/config_impl.hpp": ("io", "#include <m2lm/io/config.hpp>\n#include <m2lm/interop/json.hpp>\n#include <sys/mman.h>\n"),
    "models/model.hpp": ("models", "#include <m2lm/parts/decoders/llama.hpp>\n#include <m2lm/io/config.hpp>\n"),
    "core_impl.hpp": ("m2lm", "#include <m2lm/backends/cpu/cpu_impl.hpp>\n"),
    "core.hpp": ("m2lm", "#include <m2lm/backends/cpu/cpu.hpp>\n#include <m2lm/core_impl.hpp>\n"),
    "impl.hpp": ("m2lm", "#include <m2lm/core_impl.hpp>\n#include <m2lm/io/config_impl.hpp>\n"),
    "m2lm.hpp": ("m2lm", "#include <m2lm/core.hpp>\n#include <m2lm/models/model.hpp>\n#include <m2lm/impl.hpp>\n"),
    "xtensor.hpp": ("m2lm", "#include <m2lm/interop/xtensor.hpp>\n#include <m2lm/m2lm.hpp>\n"),
    "m2lm.cuh": ("m2lm", "#include <m2lm/m2lm.hpp>\n#include <m2lm/backends/cuda/gemm.cuh>\n"),
}

# header, lines to add, what the report must say
FAULTS = [
    ("core/view.hpp", "#include <m2lm/ops/linear.hpp>", "floor core may not include floor ops"),
    ("layers/linear.hpp", "#include <m2lm/backends/cpu/cpu.hpp>", "floor layers may not include floor backends"),
    ("layers/linear.hpp", "#include <m2lm/interop/eigen.hpp>", "floor layers may not include floor interop"),
    ("interop/eigen.hpp", "#include <m2lm/ops/linear.hpp>", "floor interop may not include floor ops"),
    ("models/model.hpp", "#include <m2lm/backends/cpu/cpu.hpp>", "floor models may not include floor backends"),
    ("ops/linear.hpp", "#include <m2lm/m2lm.hpp>", "stands above every floor"),
    ("io/config.hpp", "#include <nlohmann/json.hpp>", "belongs to interop/json.hpp"),
    ("interop/json.hpp", "#include <stb/stb_image.h>", "belongs to interop/stb.hpp"),
    ("core/view.hpp", "#include <Eigen/Core>", "belongs to interop/eigen.hpp"),
    ("core/view.hpp", "#include <xtensor/xarray.hpp>", "belongs to interop/xtensor.hpp"),
    ("m2lm.hpp", "#include <m2lm/interop/xtensor.hpp>", "which is for those who ask for it"),
    ("core/view.hpp", "#include <boost/array.hpp>", "neither standard nor known"),
    ("core/view.hpp", "#include <cuda_runtime.h>", "only a .cuh may include it"),
    ("io/config.hpp", "#include <m2lm/interop/json.hpp>", "a declaration includes the reader"),
    ("backends/cpu/cpu.hpp", "#include <m2lm/backends/cpu/cpu_impl.hpp>", "a declaration includes the definitions"),
    ("backends/cpu/cpu.hpp", "#include <m2lm/backends/cuda/gemm.cuh>", "a .hpp includes the .cuh"),
    ("io/config.hpp", "#include <m2lm/io/gone.hpp>", "does not exist"),
    ("io/config.hpp", '#include "config_impl.hpp"', "write <m2lm/…>"),
    ("layers/linear.hpp", "#include <m2lm/layers/norm.hpp>",
     "cycle: layers/linear.hpp -> layers/norm.hpp -> layers/linear.hpp"),
    ("core/view.hpp", "#if defined(__GNUC__)\n#endif", "tells compilers apart"),
    ("extras/thing.hpp", "", "no floor has the directory extras"),
    ("core.hpp", "#include <m2lm/models/model.hpp>", "core.hpp may not include floor models"),
    ("backends/cpu/cpu_impl.hpp", "#include <m2lm/interop/json.hpp>", "core.hpp reaches the reader interop/json.hpp"),
    ("sampling/greedy.hpp", "", "sampling/greedy.hpp is not reached from m2lm.hpp"),
    ("backends/cuda/norm.cuh", "", "backends/cuda/norm.cuh is not reached from m2lm.cuh"),
    ("m2lm.hpp", "#include <m2lm/backends/cuda/gemm.cuh>", "a .hpp includes the .cuh"),
    ("io/audio_impl.hpp", "", "io/audio_impl.hpp is not reached from impl.hpp"),
    ("core/view.hpp", None, "does not open with `// Floor: core"),
]


def write(root, tree):
    for name, (floor, body) in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        opening = "// A header.\n" + (f"// Floor: {floor}. May include: what is below.\n" if floor else "")
        path.write_text(opening + "#pragma once\n" + body, encoding="utf-8")


def report(tree):
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        write(root, tree)
        return check_includes.check(root)


def with_fault(header, addition):
    tree = dict(GOOD)
    floor, body = tree.get(header, (header.split("/")[0], ""))
    tree[header] = (None, body) if addition is None else (floor, body + addition + "\n")
    if addition and "norm.hpp" in addition:
        tree["layers/norm.hpp"] = ("layers", "#include <m2lm/layers/linear.hpp>\n")
    return tree


def main():
    failed = 0
    problems = report(GOOD)
    if problems:
        failed += 1
        print("a good tree is refused:\n  " + "\n  ".join(problems))
    for header, addition, expected in FAULTS:
        problems = report(with_fault(header, addition))
        if not any(expected in problem for problem in problems):
            failed += 1
            print(f"not seen: {header} with `{addition}` (expected: {expected}); the report: {problems}")
    print(f"{len(FAULTS) + 1 - failed} of {len(FAULTS) + 1} trees judged rightly")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

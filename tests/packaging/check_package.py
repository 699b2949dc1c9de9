#!/usr/bin/env python3
"""The package as other projects see it: installed, found, added, fetched. Nothing is downloaded.

install           an install needs no compiler, and puts exactly the expected files into include/ and share/
find_package      a moved install is found, by version and component; programs build against it and run
build_tree        the same of a build tree that was never installed
cuda              the component cuda says what is missing; m2lm_instantiate adds a model to a target
add_subdirectory  a program in the same build; nothing of the including project changes
reexport          a library that links m2lm is installed, exported from its build tree, and found from both
fetch_content     a program that declares m2lm with FetchContent, fully disconnected
pkg_config        plain g++ with the flags of the .pc files of a moved install
archive           what cpack packs is a prefix, wherever it is unpacked
deb               what cpack packs for Debian is one package for all architectures, and a prefix
presets           CMakePresets.json names no path, and what the tests do not build configures
examples          the examples build as a project of their own
xtensor_layouts   the headers of xtensor where 0.24 has them, and where 0.26 does
gdb               the installed pretty printer, by gdb in batch mode
abi               two versions in one program keep apart, and objects that mix them do not link
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
SKIPPED = 77
STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror")
PARTS = ("core", "m2lm", "compiled")
CHEAP = ("core",)  # the others take a minute of a processor, and are tried once, by find_package

NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


class Failure(Exception):
    pass


class Package:
    def __init__(self, options):
        self.source, self.work = options.source_dir.resolve(), options.work_dir.resolve()
        self.cmake, self.compiler, self.nvcc = options.cmake, options.compiler, options.nvcc
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)

    def run(self, *command, expect_failure=None, env=None, cwd=None):
        """Runs a command that must succeed, or must fail and say `expect_failure`."""
        command = [str(word) for word in command]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=cwd,
                                env={**os.environ, **(env or {})})
        # CMake wraps its messages; compare them on one line.
        output = re.sub(r"\s+", " ", result.stdout)
        if expect_failure is None and result.returncode != 0:
            raise Failure(f"{' '.join(command)}\n{result.stdout[-4000:]}")
        if expect_failure is not None and (result.returncode == 0 or expect_failure not in output):
            raise Failure(f"{' '.join(command)}\nshould fail and say: {expect_failure}\n{result.stdout[-4000:]}")
        return result.stdout

    def configure_without_compiler(self, *arguments):
        build = self.work / "m2lm-build"
        self.run(self.cmake, "-G", "Ninja", "-S", self.source, "-B", build, *arguments, env=NO_COMPILER)
        return build

    def install(self):
        """Installs without a compiler and moves the result; returns the prefix."""
        prefix, moved = self.work / "prefix", self.work / "moved"
        build = self.configure_without_compiler(f"-DCMAKE_INSTALL_PREFIX={prefix}")
        self.run(self.cmake, "--install", build, env=NO_COMPILER)
        prefix.rename(moved)
        return moved

    def configure(self, consumer, build, *arguments, parts=PARTS, **kwargs):
        return self.run(self.cmake, "-G", "Ninja", "-S", HERE / consumer, "-B", self.work / build,
                        f"-DCMAKE_CXX_COMPILER={self.compiler}", f"-DM2LM_USER_PARTS={';'.join(parts)}", *arguments, **kwargs)

    def build_and_run(self, build, parts=PARTS):
        self.run(self.cmake, "--build", self.work / build, "-j", "1")
        for part in parts:
            print(f"user_{part}: {self.run(self.work / build / f'user_{part}').strip() or 'ok'}")


def check_install(package):
    prefix = package.install()
    installed = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if not path.is_dir()}
    headers = {f"include/{path.relative_to(package.source / 'include')}" for path in (package.source / "include").rglob("*")
               if path.suffix in {".hpp", ".cuh"}}
    others = set((HERE / "manifest.txt").read_text(encoding="utf-8").split())
    for name in sorted(installed ^ (headers | others)):
        raise Failure(f"{name}: {'installed but not expected' if name in installed else 'expected but not installed'}")
    for path in prefix.rglob("*.cmake"):
        for place in (package.source, package.work):
            if str(place) in path.read_text(encoding="utf-8"):
                raise Failure(f"{path.name} names the path {place}")
    print(f"{len(installed)} files installed, no path of this machine in them")


def configure_documents(package, *arguments_and_languages):
    """Configures the blocks of CMake in the documents: as printed, behind what a project has before it gets to m2lm."""
    *arguments, languages = arguments_and_languages
    configured = []
    for document in (package.source / "README.md", package.source / "CONTRIBUTING.md", *sorted((package.source / "docs").rglob("*.md"))):
        for block in re.findall(r"^```cmake\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            if ("CUDA" in block) != ("CUDA" in languages):
                continue
            project = package.work / f"document{len(configured)}"
            project.mkdir()
            for name in ("main.cpp", "vlm.hpp"):
                (project / name).write_text("int main() {}\n" if name == "main.cpp" else "#pragma once\n", encoding="utf-8")
            head = "cmake_minimum_required(VERSION 3.21)\n" + ("" if "project(" in block else "project(documented CXX)\nadd_executable(app main.cpp)\n")
            (project / "CMakeLists.txt").write_text(head + block, encoding="utf-8")
            package.run(package.cmake, "-G", "Ninja", "-S", project, "-B", project / "build", f"-DCMAKE_CXX_COMPILER={package.compiler}", *arguments)
            configured.append(str(document.relative_to(package.source)))
    if not configured:
        raise Failure(f"no document has a block of CMake for {languages}")
    print(f"configured: the blocks of CMake in {', '.join(configured)}")


def check_find_package(package):
    prefix = package.install()
    found = f"-DCMAKE_PREFIX_PATH={prefix}"
    version = re.search(r'set\(PACKAGE_VERSION "([0-9.]+)"\)', (prefix / "share/cmake/m2lm/m2lmConfigVersion.cmake").read_text())
    major, minor, _ = version.group(1).split(".")

    without_readers = [f"-DCMAKE_DISABLE_FIND_PACKAGE_{name}=ON" for name in ("nlohmann_json", "SentencePiece", "Stb")]
    package.configure("find_package", "newer", found, f"-DM2LM_USER_VERSION={major}.{int(minor) + 1}",
                      expect_failure="compatible with requested version")
    package.configure("find_package", "unknown", found, parts=["telepathy"],
                      expect_failure="m2lm has no component 'telepathy'; it has: core")
    package.configure("find_package", "missing", found, *without_readers, parts=["m2lm"],
                      expect_failure="m2lm::m2lm needs what was not found: nlohmann_json;SentencePiece;Stb")
    package.configure("find_package", "no-xtensor", found, "-DCMAKE_DISABLE_FIND_PACKAGE_xtensor=ON", parts=["xtensor"],
                      expect_failure="m2lm::xtensor needs what was not found: xtensor (Debian's libxtensor-dev)")
    package.configure("find_package", "optional", found, "-DCMAKE_DISABLE_FIND_PACKAGE_xtensor=ON", "-DM2LM_USER_OPTIONAL=xtensor", parts=["core"])
    package.configure("find_package", "xtensor", found, parts=["xtensor"])
    package.configure("find_package", "core-only", found, *without_readers, parts=["core"])
    configure_documents(package, found, "CXX")
    package.configure("find_package", "build", found, f"-DM2LM_USER_VERSION={major}.{minor}")
    package.build_and_run("build")


def check_cuda(package):
    prefix = package.install()
    found, no_toolkit = f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON"
    package.configure("cuda", "no-toolkit", found, no_toolkit, "-DM2LM_USER_LANGUAGES=CXX",
                      expect_failure="m2lm::cuda needs what was not found: a CUDA toolkit")
    package.configure("find_package", "without", found, no_toolkit, "-DM2LM_USER_OPTIONAL=cuda")
    if not package.nvcc:
        print("SKIPPED: no nvcc, so m2lm_instantiate was not called")
        return SKIPPED
    package.configure("cuda", "no-language", found, "-DM2LM_USER_LANGUAGES=CXX", f"-DCUDAToolkit_ROOT={pathlib.Path(package.nvcc).parents[1]}",
                      expect_failure="needs nvcc: project(... LANGUAGES CXX CUDA)")
    package.configure("cuda", "build", found, "-DM2LM_USER_LANGUAGES=CXX;CUDA", f"-DCMAKE_CUDA_COMPILER={package.nvcc}",
                      "-DCMAKE_CUDA_ARCHITECTURES=90", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    commands = (package.work / "build" / "compile_commands.json").read_text(encoding="utf-8")
    for name in ("my_model_my__Vlm.cu", "my_model_my__Vlm.cpp"):
        unit = package.work / "build" / "m2lm_instantiate" / name
        if str(unit) not in commands or str(HERE / "cuda" / "my_model.hpp") not in unit.read_text(encoding="utf-8"):
            raise Failure(f"{unit} is not what my_model is made of")
    if not re.search(r"nvcc .*-std=c\+\+20 .*my_model_my__Vlm\.cu\b", commands):
        raise Failure("the .cu is not compiled as C++20")
    if "TrainingKernelsOf<my::Vlm::Backend::Element>" not in (package.work / "build" / "m2lm_instantiate" / "my_model_my__Vlm.cu").read_text():
        raise Failure("TRAINING does not add the kernels of backward passes")
    configure_documents(package, found, "CXX CUDA")
    print("my_model is made of a .cu and a .cpp that include my_model.hpp")


def check_build_tree(package):
    build = package.configure_without_compiler()
    package.configure("find_package", "build", f"-Dm2lm_DIR={build / 'package'}", parts=CHEAP)
    package.build_and_run("build", CHEAP)


def check_add_subdirectory(package):
    package.configure("add_subdirectory", "build", f"-DM2LM_SOURCE_DIR={package.source}", parts=CHEAP)
    package.build_and_run("build", CHEAP)


def check_reexport(package):
    source = f"-DM2LM_SOURCE_DIR={package.source}"
    package.configure("reexport", "no-export", source, expect_failure="that is not in any export set")
    prefix = package.work / "prefix"
    package.configure("reexport", "export", source, "-DM2LM_INSTALL=ON", f"-DCMAKE_INSTALL_PREFIX={prefix}")
    package.run(package.cmake, "--install", package.work / "export")
    prefix.rename(package.work / "moved")
    package.configure("reexport/user", "installed", f"-DCMAKE_PREFIX_PATH={package.work / 'moved'}", parts=CHEAP)
    package.build_and_run("installed", CHEAP)
    package.configure("reexport/user", "exported", f"-Dwrapper_DIR={package.work / 'export'}",
                      f"-Dm2lm_DIR={package.work / 'export' / 'm2lm' / 'package'}", parts=CHEAP)


def check_fetch_content(package):
    package.configure("fetch_content", "build", f"-DM2LM_SOURCE_DIR={package.source}", "-DFETCHCONTENT_FULLY_DISCONNECTED=ON", parts=CHEAP)
    package.build_and_run("build", CHEAP)


def check_pkg_config(package):
    if not shutil.which("pkg-config"):
        print("SKIPPED: no pkg-config")
        return SKIPPED
    prefix = package.install()
    path = {"PKG_CONFIG_PATH": str(prefix / "share" / "pkgconfig")}

    def flags(name):
        return package.run("pkg-config", "--cflags", "--libs", name, env=path).split()

    program = package.work / "user_core"
    package.run(package.compiler, "-std=c++20", *STRICT, HERE / "core_user.cpp", *flags("m2lm-core"), "-o", program)
    package.run(program)
    everything = flags("m2lm")
    if "-lsentencepiece" not in everything:
        raise Failure(f"m2lm.pc links no sentencepiece: {everything}")
    # Compiled in full by find_package; here every header is found, and the libraries are.
    package.run(package.compiler, "-std=c++20", "-E", "-o", os.devnull, HERE / "m2lm_user.cpp", *everything)
    empty = package.work / "empty.cpp"
    empty.write_text("int main() {}\n", encoding="utf-8")
    package.run(package.compiler, empty, *everything, "-o", package.work / "empty")
    print(" ".join(everything))


def check_archive(package):
    build = package.configure_without_compiler()
    package.run("cpack", "-G", "TGZ", "--config", build / "CPackConfig.cmake", "-B", package.work / "packed", env=NO_COMPILER)
    archives = list((package.work / "packed").glob("m2lm-*.tar.gz"))
    if len(archives) != 1:
        raise Failure(f"cpack made {archives}")
    anywhere = package.work / "any where"
    shutil.unpack_archive(archives[0], anywhere)
    (prefix,) = anywhere.iterdir()
    package.configure("find_package", "build", f"-DCMAKE_PREFIX_PATH={prefix}", parts=CHEAP)
    package.build_and_run("build", CHEAP)
    print(f"{archives[0].name} is a prefix")


def check_deb(package):
    if not shutil.which("dpkg-deb"):
        print("SKIPPED: no dpkg-deb")
        return SKIPPED
    build = package.configure_without_compiler()
    package.run("cpack", "-G", "DEB", "--config", build / "CPackConfig.cmake", "-B", package.work / "packed", env=NO_COMPILER)
    (deb,) = (package.work / "packed").glob("*.deb")
    version = re.search(r"^CMAKE_PROJECT_VERSION:STATIC=([\d.]+)", (build / "CMakeCache.txt").read_text(encoding="utf-8"), re.MULTILINE).group(1)
    if deb.name != f"libm2lm-dev_{version}_all.deb":
        raise Failure(f"cpack made {deb.name}")
    control = dict(re.findall(r"^(\S+): (.*)$", package.run("dpkg-deb", "-f", deb), re.MULTILINE))
    # What README's set-up command installs for those who build the library is what its users need, but for tools and the programs' CLI11.
    needed = set(re.search(r"^packages=\((.+)\)$", (package.source / "tools/setup.sh").read_text(encoding="utf-8"), re.MULTILINE).group(1).split())
    depends = {re.sub(r" \(.*", "", name) for name in control["Depends"].split(", ")}
    if control["Architecture"] != "all" or depends != needed - {"g++", "cmake", "ninja-build", "libcli11-dev"}:
        raise Failure(f"the package says {control}")
    files = re.findall(r"^-\S+ .* \./(.+)$", package.run("dpkg-deb", "-c", deb), re.MULTILINE)
    strays = [name for name in files if not name.startswith(("usr/include/m2lm/", "usr/share/"))]
    if strays or len(files) < 100:
        raise Failure(f"{len(files)} files, of them elsewhere: {strays}")
    package.run("dpkg", "-x", deb, package.work / "root")
    package.configure("find_package", "build", f"-DCMAKE_PREFIX_PATH={package.work / 'root' / 'usr'}", parts=CHEAP)
    package.build_and_run("build", CHEAP)
    print(f"{deb.name}: {len(files)} files")


def check_presets(package):
    text = (package.source / "CMakePresets.json").read_text(encoding="utf-8")
    if re.search(r'"(?:/|~|[A-Za-z]:[\\/])', text):
        raise Failure("CMakePresets.json names a path of a machine")
    presets = json.loads(text)
    listed = package.run(package.cmake, "-S", package.source, "--list-presets=all", cwd=package.source)
    visible = {preset["name"] for preset in presets["configurePresets"] if not preset.get("hidden")}
    described = set(re.findall(r"`([\w-]+)`", "".join(re.findall(r"^\| (`.+?) \|", (package.source / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE))))
    for kind in ("build", "test"):
        described -= {preset["name"] for preset in presets[f"{kind}Presets"]} - visible
    if described != visible or not visible <= set(re.findall(r'"([\w-]+)"', listed)):
        raise Failure(f"CONTRIBUTING.md describes {sorted(described)}, cmake lists\n{listed}")
    built = visible & set(re.findall(r"\bbuild ([\w-]+)", (package.source / "tools" / "test.sh").read_text(encoding="utf-8")))
    without_nvcc = {name for name in visible if not name.startswith("cuda") or package.nvcc}
    for name in sorted(without_nvcc - built):
        package.run(package.cmake, "--preset", name, "-B", package.work / name, cwd=package.source)
        print(f"configured: {name}")
    print(f"{len(visible)} presets, built by tools/test.sh: {', '.join(sorted(built))}")


def check_examples(package):
    prefix = package.install()
    found, build = f"-DCMAKE_PREFIX_PATH={prefix}", package.work / "build"
    package.run(package.cmake, "-G", "Ninja", "-S", package.source / "examples", "-B", build, f"-DCMAKE_CXX_COMPILER={package.compiler}", found)
    programs = sorted(path.stem for path in (package.source / "examples").glob("*.cpp"))
    targets = package.run("ninja", "-C", build, "-t", "targets", "all")
    for name in programs:
        if not re.search(rf"^{name}: CXX_EXECUTABLE", targets, re.MULTILINE):
            raise Failure(f"examples/{name}.cpp is no program of the stand-alone project")
    # All are compiled and run as part of the library's own build; here one, as others would.
    package.run(package.cmake, "--build", build, "--target", "CMakeFiles/attention_layer.dir/attention_layer.cpp.o")
    print(f"{len(programs)} programs, attention_layer compiled")


def check_xtensor_layouts(package):
    """0.26's layout is a tree of headers that forward to the installed one, or the other way round where that is the new one."""
    users = [package.source / "include/m2lm/interop/xtensor.hpp", package.source / "tests/support/xtensor.hpp"]
    text = "".join(path.read_text(encoding="utf-8") for path in users)
    new, old = re.findall(r"#include <(xtensor/\w+/\w+\.hpp)>", text), re.findall(r"#include <(xtensor/\w+\.hpp)>", text)
    program = package.work / "program.cpp"
    program.write_text("""#include <m2lm/interop/xtensor.hpp>
#include "xtensor.hpp"
int main() {
  m2lm::Tensor<float> t(m2lm::Shape{2, 3});
  m2lm::as_xtensor(t.view<2>()) += 1.0F;
  return m2lm::to_tensor(xt::flip(m2lm::as_xarray(t), 1)).span()[0] == 1.0F ? 0 : 1;
}
""", encoding="utf-8")
    command = [package.compiler, "-std=c++20", *STRICT, "-I", package.source / "include", "-I", package.source / "tests/support", program]
    installed = package.run(*command, "-H", "-o", package.work / "installed")
    package.run(package.work / "installed")
    directory = pathlib.Path(re.search(r"^\.+ (\S*/)xtensor/(?:containers/)?xarray\.hpp$", installed, re.MULTILINE).group(1))
    if (directory / "xtensor" / "containers").exists():
        print("SKIPPED: the installed xtensor has the layout of 0.26, which was tried; that of 0.24 was not")
        return SKIPPED
    tree = package.work / "tree"
    for header in new:
        target = directory / "xtensor" / pathlib.Path(header).name
        if not target.exists():
            raise Failure(f"<{header}> has no counterpart {target}")
        (tree / header).parent.mkdir(parents=True, exist_ok=True)
        (tree / header).write_text(f'#include "{target}"\n', encoding="utf-8")
    moved = package.run(*command, "-isystem", tree, "-H", "-fsyntax-only")
    # What our headers include themselves, in both runs: the line above that is one dot shorter is theirs.
    for output, wanted in ((installed, old), (moved, new)):
        included, stack = set(), []
        for dots, path in re.findall(r"^(\.+) (\S+)$", output, re.MULTILINE):
            stack[len(dots) - 1 :] = [path]
            if len(stack) > 1 and any(pathlib.Path(stack[-2]).samefile(user) for user in users) and "/xtensor/" in path:
                included.add(path[path.index("/xtensor/") + 1 :] if not path.endswith("m2lm/interop/xtensor.hpp") else "")
        if not included <= set(wanted) or not included:
            raise Failure(f"our headers include {sorted(included)}, not some of {sorted(set(wanted))}")
    print(f"{len(set(old))} headers of the layout of 0.24, {len(set(new))} of that of 0.26")


def check_gdb(package):
    if not shutil.which("gdb"):
        print("SKIPPED: no gdb")
        return SKIPPED
    prefix, source, program = package.install(), HERE / "gdb" / "tensors.cpp", package.work / "tensors"
    package.run(package.compiler, "-std=c++20", "-g", "-O0", *STRICT, "-I", prefix / "include", source, "-o", program)
    expected = re.findall(r"// print (\w+): (.+)", source.read_text(encoding="utf-8"))
    commands = [f"source {prefix / 'share/m2lm/m2lm_gdb.py'}", "break done", "run", "up", *(f"print {name}" for name, _ in expected)]
    output = package.run("gdb", "--batch", "--nx", *(word for command in commands for word in ("-ex", command)), program,
                         env={"LC_ALL": "C.UTF-8", "DEBUGINFOD_URLS": ""})
    if "ptrace: Operation not permitted" in output or "Couldn't get registers" in output:
        print("SKIPPED: gdb may not run programs here")
        return SKIPPED
    printed = re.findall(r"^\$\d+ = (.*)$", output, re.MULTILINE)
    for (name, text), line in zip(expected, printed + [""] * len(expected)):
        if line != text:
            raise Failure(f"gdb prints of {name}\n  {line}\ninstead of\n  {text}\n{output[-2000:]}")
    print(f"{len(expected)} values printed as they should be")


def check_abi(package):
    """The headers as they are, and as the next minor version would be."""
    version = (package.source / "include/m2lm/version.hpp").read_text(encoding="utf-8")
    major, minor = (int(re.search(rf"define M2LM_VERSION_{part} (\d+)", version).group(1)) for part in ("MAJOR", "MINOR"))
    shutil.copytree(package.source / "include", package.work / "newer")
    (package.work / "newer/m2lm/version.hpp").write_text(version.replace(f"VERSION_MINOR {minor}", f"VERSION_MINOR {minor + 1}"), encoding="utf-8")
    include = {"older": package.source / "include", "newer": package.work / "newer"}
    flags = package.run("pkg-config", "--cflags", "eigen3").split() if shutil.which("pkg-config") else ["-isystem", "/usr/include/eigen3"]

    def compiled(source, side):
        unit = package.work / f"{pathlib.Path(source).stem}_{side}.o"
        package.run(package.compiler, "-std=c++20", "-O0", *STRICT, f"-DSIDE={side}", "-I", include[side], *flags, "-c", HERE / "abi" / source, "-o", unit)
        return unit

    def symbols(unit):
        defined = package.run("nm", "-C", "--defined-only", "--format=posix", unit)
        return {name for name in re.findall(r"^(.+) \w [0-9a-f]+ [0-9a-f]*$", defined, re.MULTILINE) if "m2lm" in name}

    sides = {side: compiled("side.cpp", side) for side in include}
    names = {side: symbols(unit) for side, unit in sides.items()}
    for side, number in (("older", minor), ("newer", minor + 1)):
        tag = f"m2lm::v{major}_{number}::"
        untagged = sorted(name for name in names[side] if "m2lm::" in name.replace(tag, ""))
        if untagged or len(names[side]) < 100:
            raise Failure(f"{len(names[side])} symbols of m2lm, and outside {tag} are: " + "\n".join(untagged[:20]))
    common = sorted(names["older"] & names["newer"])
    if common:
        raise Failure("both versions define\n" + "\n".join(common[:20]))
    program = package.work / "program"
    package.run(package.compiler, "-std=c++20", *STRICT, HERE / "abi" / "main.cpp", *sides.values(), "-pthread", "-o", program)
    print(package.run(program).strip())

    # The same function, called with the tensor of its version and with that of another.
    taker, givers = compiled("taker.cpp", "newer"), {side: compiled("giver.cpp", side) for side in include}
    package.run(package.compiler, givers["newer"], taker, "-pthread", "-o", package.work / "same")
    package.run(package.work / "same")
    package.run(package.compiler, givers["older"], taker, "-pthread", "-o", package.work / "mixed",
                expect_failure=f"undefined reference to `first_of(m2lm::v{major}_{minor}::Tensor<float> const&)'", env={"LC_ALL": "C"})
    print(f"{len(names['older'])} and {len(names['newer'])} symbols, none in common; objects of {major}.{minor} and {major}.{minor + 1} do not mix")


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def main(checks, description):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=checks)
    parser.add_argument("--source-dir", type=pathlib.Path, required=True)
    parser.add_argument("--work-dir", type=pathlib.Path, required=True, help="emptied first")
    parser.add_argument("--cmake", default="cmake")
    parser.add_argument("--compiler", default="c++")
    parser.add_argument("--nvcc", default="", help="empty: there is none")
    options = parser.parse_args()
    try:
        return checks[options.check](Package(options)) or 0
    except Failure as failure:
        print(f"FAILED: {failure}")
        return 1


if __name__ == "__main__":
    sys.exit(main(CHECKS, __doc__))

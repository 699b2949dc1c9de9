#!/usr/bin/env python3
"""The package as package managers hand it on. Nothing is downloaded but Conan itself, from PyPI, where no conan is installed.

conan     `conan create`, with the recipes it requires replaced by stubs of the system's libraries; one package id for all settings
vcpkg     the overlay port: what its files may say, the trees it installs, what lint refuses, and a program that builds against it
versions  header, CMake, Conan, vcpkg and the list of changes name one version
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import venv

import check_package
from check_package import CHEAP, HERE, SKIPPED, Failure, Package

STUBS = {"eigen": "3.4.0", "nlohmann_json": "3.11.2", "sentencepiece": "0.1.97", "stb": "cci.20230920", "xtensor": "0.24.3"}


def find_conan(work):
    """conan of PATH, or one in a virtual environment beside the working directory, which is kept."""
    found = shutil.which("conan")
    if found:
        return found
    environment = work.parent / "conan-environment"
    conan = environment / "bin" / "conan"
    if not conan.exists():
        try:
            venv.create(environment, with_pip=True, clear=True)
        except subprocess.CalledProcessError:
            return None  # Debian without python3-venv
        installed = subprocess.run([environment / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1", "conan>=2,<3"],
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        print(installed.stdout, end="")
    return str(conan) if conan.exists() else None


def check_conan(package):
    conan = find_conan(package.work)
    if not conan:
        print("SKIPPED: no conan in PATH, and none could be installed from PyPI")
        return SKIPPED
    home = {"CONAN_HOME": str(package.work / "home")}
    # Nothing is written into the source tree, and nothing asked of a server.
    settings = ("-c:a", f"tools.cmake.cmake_layout:test_folder={package.work / 'test'}", "-c:a", "tools.cmake.cmaketoolchain:generator=Ninja",
                "-c:a", f"tools.build:compiler_executables={{'cpp': '{shutil.which(package.compiler)}'}}")

    def run(*arguments, **kwargs):
        return package.run(conan, *arguments, env=home, **kwargs)

    run("profile", "detect")
    run("remote", "disable", "*")
    for name, version in STUBS.items():
        run("export", HERE / "conan_stubs", "--name", name, "--version", version)
    run("create", package.source, "-s", "compiler.cppstd=17", "--build=missing", *settings, expect_failure="Current cppstd (17) is lower than the required C++ standard (20)")
    output = run("create", package.source, "-s", "compiler.cppstd=20", "-o", "m2lm/*:with_xtensor=True", "--build=missing", *settings)
    if "m2lm::xtensor" not in output or "user_core" not in output:
        raise Failure(f"the test_package did not see the components:\n{output[-3000:]}")
    (folder,) = {line for line in re.findall(r"Package folder (\S+)", output) if "m2lm" in pathlib.Path(line).parent.name}
    check_files(package, pathlib.Path(folder))

    identities = set()
    for variant in (("-s", "build_type=Debug"), ("-s", "build_type=Release", "-o", "m2lm/*:core_only=True"), ("-s", "arch=armv8", "-o", "m2lm/*:with_cuda=True")):
        graph = json.loads(run_json(package, conan, home, "graph", "info", package.source, "-s", "compiler.cppstd=23", *variant, "--format=json"))
        identities.add(next(node["package_id"] for node in graph["graph"]["nodes"].values() if (node["ref"] or "").startswith("m2lm/")))
    (identity,) = identities
    if identity not in output:
        raise Failure(f"other settings have another package id, {identity}")
    print(f"created, used, and the same package {identity} for all settings and options")


def run_json(package, conan, home, *arguments):
    result = subprocess.run([conan, *map(str, arguments)], env={**os.environ, **home}, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise Failure(f"conan {arguments}\n{result.stderr[-3000:]}")
    return result.stdout


def check_files(package, folder):
    headers = {str(path.relative_to(package.source)) for path in (package.source / "include").rglob("*") if path.suffix in {".hpp", ".cuh"}}
    packed = {str(path.relative_to(folder)) for path in (folder / "include").rglob("*") if path.is_file()}
    if packed != headers or not (folder / "licenses" / "LICENSE").exists():
        raise Failure(f"the package lacks or adds {sorted(packed ^ headers)}, or has no licence")


def check_vcpkg(package):
    port = package.source / "cmake" / "vcpkg" / "ports" / "m2lm"
    manifests = {path: json.loads(path.read_text(encoding="utf-8")) for path in (package.source / "vcpkg.json", port / "vcpkg.json")}
    for path, manifest in manifests.items():
        check_manifest(path, manifest)
    developer, published = manifests.values()
    if not set(published["features"]) <= set(developer["features"]):
        raise Failure("a feature of the port is none of the manifest in the root")
    overlays = json.loads((package.source / "vcpkg-configuration.json").read_text(encoding="utf-8"))["overlay-ports"]
    if not any((package.source / overlay / "m2lm").samefile(port) for overlay in overlays):
        raise Failure("vcpkg-configuration.json does not lead to the port")

    def shim(directory, *arguments, **kwargs):
        return package.run(package.cmake, f"-DPORT_DIRECTORY={directory}", f"-DWORK={package.work / 'vcpkg'}", *arguments, "-P", HERE / "vcpkg_shim.cmake",
                           **kwargs)

    # The programs are compiled as part of the library's own build; here they are empty, and what is installed where is the question.
    shim(port, "-DFEATURES=tools", env={"CXX": str(HERE / "stub_compiler.sh"), "M2LM_STUB_COMPILER": package.compiler, "M2LM_STUB_SOURCES": str(package.source)})
    tools = package.work / "vcpkg" / "installed" / "x64-linux" / "tools" / "m2lm"
    programs = {path.stem for path in (package.source / "examples").glob("m2lm-*.cpp")}
    if {path.name for path in tools.iterdir()} != programs:
        raise Failure(f"the feature tools installs {sorted(path.name for path in tools.iterdir())} instead of {sorted(programs)}")
    for name in programs:
        package.run(tools / name)
    shim(port, "-DFEATURES=telepathy", expect_failure="has no feature 'telepathy'")
    check_lint(package, port, shim)
    shim(port, "-DFEATURES=xtensor")
    prefix = package.work / "vcpkg" / "installed" / "x64-linux"
    for target in re.findall(r"\bm2lm::(\w+)", (port / "usage").read_text(encoding="utf-8")):
        if target not in {"core", "m2lm", "compiled", "cuda", "xtensor"}:
            raise Failure(f"the file usage speaks of m2lm::{target}")
    prefix.rename(package.work / "moved")
    found = f"-DCMAKE_PREFIX_PATH={package.work / 'moved'}"
    package.configure("find_package", "xtensor", found, parts=["m2lm", "compiled", "xtensor"])
    package.configure("find_package", "build", found, parts=CHEAP)
    package.build_and_run("build", CHEAP)
    print("the port installs, and lint refuses what it should")


def check_manifest(path, manifest):
    problems = []
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", manifest["name"]):
        problems.append(f"the name {manifest['name']}")
    if len({"version", "version-semver", "version-date", "version-string"} & set(manifest)) != 1:
        problems.append("not exactly one version")
    for name, feature in manifest["features"].items():
        if not feature.get("description"):
            problems.append(f"the feature {name} without a description")
    lists = [manifest["dependencies"], *(feature.get("dependencies", []) for feature in manifest["features"].values())]
    for dependency in sum(lists, []):
        name = dependency if isinstance(dependency, str) else dependency["name"]
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
            problems.append(f"the dependency {name}")
    if problems:
        raise Failure(f"{path}: {problems}")


def check_lint(package, port, shim):
    """The shim refuses ports that vcpkg would refuse: what it accepts means something."""
    faults = {
        "vcpkg_install_copyright(": ("# (", "copyright is missing"),
        "tools M2LM_PROGRAMS": ("tool M2LM_PROGRAMS", "has no feature 'tool'"),
        "CONFIG_PATH share/cmake/m2lm": ("CONFIG_PATH lib/cmake/m2lm", "nothing was installed to CONFIG_PATH"),
        "OPTIONS ${FEATURE_OPTIONS}": ("OPTIONS -DM2LM_TELEPATHY=ON", "the project ignores the option M2LM_TELEPATHY"),
        'file(REMOVE_RECURSE "${CURRENT_PACKAGES_DIR}/share/licenses")': ("", "leaves share/licenses"),
        'file(INSTALL "${CURRENT_PORT_DIR}/usage"': ('file(MAKE_DIRECTORY "${CURRENT_PACKAGES_DIR}/share/m2lm/none")\nset(x "${CURRENT_PORT_DIR}/usage"', "is empty"),
    }
    portfile = (port / "portfile.cmake").read_text(encoding="utf-8")
    faulty = package.work / "faulty" / "m2lm"
    shutil.copytree(port, faulty)
    for what, (instead, message) in faults.items():
        if what not in portfile:
            raise Failure(f"the portfile has no {what} to make a fault of")
        text = portfile.replace(what, instead).replace("${CURRENT_PORT_DIR}/../../../..", str(package.source))
        (faulty / "portfile.cmake").write_text(text, encoding="utf-8")
        shim(faulty, expect_failure=message)


def check_versions(package):
    def one(path, pattern):
        found = re.findall(pattern, (package.source / path).read_text(encoding="utf-8"), re.MULTILINE)
        if not found:
            raise Failure(f"{path} names no version ({pattern})")
        return found[0] if isinstance(found[0], str) else ".".join(found[0])

    header = ".".join(re.findall(r"define M2LM_VERSION_\w+ (\d+)", (package.source / "include/m2lm/version.hpp").read_text(encoding="utf-8")))
    versions = {
        "vcpkg.json": one("vcpkg.json", r'"version-semver": "([\d.]+)"'),
        "cmake/vcpkg/ports/m2lm/vcpkg.json": one("cmake/vcpkg/ports/m2lm/vcpkg.json", r'"version-semver": "([\d.]+)"'),
        "CHANGELOG.md": one("CHANGELOG.md", r"^## (\d+\.\d+\.\d+)"),
        "README.md": one("README.md", r"find_package\(m2lm (\d+\.\d+)") + "." + header.split(".")[2],
    }
    build = package.configure_without_compiler()
    versions["CMake"] = one(build / "CMakeCache.txt", r"^CMAKE_PROJECT_VERSION:STATIC=([\d.]+)")
    versions["the package"] = one(build / "package" / "m2lmConfigVersion.cmake", r'set\(PACKAGE_VERSION "([\d.]+)"\)')
    versions["pkg-config"] = one(build / "m2lm.pc", r"^Version: ([\d.]+)")
    # The recipe reads the header; its expression must find it there.
    pattern = re.search(r're\.findall\(r"(.+?)", text\)', (package.source / "conanfile.py").read_text(encoding="utf-8")).group(1)
    versions["conanfile.py"] = ".".join(re.findall(pattern, (package.source / "include/m2lm/version.hpp").read_text(encoding="utf-8")))
    for place, version in versions.items():
        if version != header:
            raise Failure(f"{place} says version {version}, include/m2lm/version.hpp {header}")
    print(f"{header} in {', '.join(versions)}")


CHECKS = {name.removeprefix("check_"): globals()[name] for name in ("check_conan", "check_vcpkg", "check_versions")}

if __name__ == "__main__":
    sys.exit(check_package.main(CHECKS, __doc__))

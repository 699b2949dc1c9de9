"""Conan 2 recipe: a header library, one package for every setting. Components mirror those of the CMake package; the options say what
a consumer will use, and so what is required. `conan create . --build=missing` builds and runs tests/packaging/conan."""

import os
import re

from conan import ConanFile
from conan.tools.build import check_min_cppstd
from conan.tools.files import copy, load
from conan.tools.layout import basic_layout

required_conan_version = ">=2.0"


class M2lmConan(ConanFile):
    name = "m2lm"
    description = "Multimodal language models as C++20 types"
    license = "Apache-2.0"
    topics = ("llm", "multimodal", "inference", "header-only")
    package_type = "header-library"
    settings = "os", "arch", "compiler", "build_type"
    options = {"core_only": [True, False], "with_xtensor": [True, False], "with_cuda": [True, False]}
    default_options = {"core_only": False, "with_xtensor": False, "with_cuda": False}
    exports_sources = "include/*", "cmake/*", "LICENSE"
    no_copy_source = True
    test_package_folder = "tests/packaging/conan"

    def set_version(self):
        text = load(self, os.path.join(self.recipe_folder, "include", "m2lm", "version.hpp"))
        self.version = ".".join(re.findall(r"define M2LM_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", text))

    def layout(self):
        basic_layout(self)

    def requirements(self):
        self.requires("eigen/[>=3.4 <6]", transitive_headers=True)
        if not self.options.core_only:
            self.requires("nlohmann_json/[>=3.10 <4]", transitive_headers=True)
            self.requires("sentencepiece/[>=0.1.97 <1]", transitive_headers=True, transitive_libs=True)
            self.requires("stb/[*]", transitive_headers=True)
        if self.options.with_xtensor:
            self.requires("xtensor/[>=0.24 <1]", transitive_headers=True)

    def validate(self):
        check_min_cppstd(self, 20)

    def package_id(self):
        self.info.clear()

    def package(self):
        copy(self, "LICENSE", self.source_folder, os.path.join(self.package_folder, "licenses"))
        for pattern in ("*.hpp", "*.cuh"):
            copy(self, pattern, os.path.join(self.source_folder, "include"), os.path.join(self.package_folder, "include"))
        for file in ("compiled.cpp", "m2lmCompiled.cmake", "m2lmCuda.cmake", "m2lmInstantiate.cpp.in", "m2lmInstantiate.cu.in"):
            copy(self, file, os.path.join(self.source_folder, "cmake"), os.path.join(self.package_folder, "cmake"))

    def package_info(self):
        self.cpp_info.set_property("cmake_file_name", "m2lm")
        self.cpp_info.set_property("cmake_target_name", "m2lm::package")  # all components; m2lm::m2lm is one of them
        self.cpp_info.bindirs, self.cpp_info.libdirs = [], []

        def component(name, requires):
            part = self.cpp_info.components[name]
            part.set_property("cmake_target_name", f"m2lm::{name}")
            part.bindirs, part.libdirs = [], []
            part.requires = requires
            return part

        core = component("core", ["eigen::eigen"])
        if self.settings.get_safe("os") in ("Linux", "FreeBSD"):
            core.system_libs = ["pthread"]
        if self.options.core_only:
            return
        component("m2lm", ["core", "nlohmann_json::nlohmann_json", "sentencepiece::sentencepiece", "stb::stb"])
        # m2lm::compiled, and with a CUDA toolkit m2lm::cuda and m2lm_instantiate, are made in the consumer's build.
        modules = ["cmake/m2lmCompiled.cmake"]
        if self.options.with_cuda:
            modules.append("cmake/m2lmCuda.cmake")
        self.cpp_info.set_property("cmake_build_modules", modules)
        if self.options.with_xtensor:
            component("xtensor", ["m2lm", "xtensor::xtensor"])

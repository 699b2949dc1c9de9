"""The test_package: builds and runs core_user, and asks for the other targets."""

import os

from conan import ConanFile
from conan.tools.build import can_run
from conan.tools.cmake import CMake, CMakeToolchain, cmake_layout


class M2lmTest(ConanFile):
    settings = "os", "arch", "compiler", "build_type"
    generators = "CMakeDeps"

    def requirements(self):
        self.requires(self.tested_reference_str)

    def layout(self):
        cmake_layout(self)

    def generate(self):
        toolchain = CMakeToolchain(self)
        toolchain.user_presets_path = False  # nothing is written beside this file
        toolchain.generate()

    def build(self):
        cmake = CMake(self)
        options = self.dependencies["m2lm"].options
        expected = ["core"] + ([] if options.core_only else ["m2lm", "compiled"]) + (["xtensor"] if options.with_xtensor else [])
        cmake.configure(variables={"M2LM_EXPECTED_TARGETS": ";".join(expected)})
        cmake.build()

    def test(self):
        if can_run(self):
            self.run(os.path.join(self.cpp.build.bindir, "user_core"), env="conanrun")

"""What the recipe index would give, from the system: only enough to resolve and link, offline."""

from conan import ConanFile

INCLUDE = {"eigen": ["/usr/include/eigen3"], "stb": ["/usr/include/stb"]}
TARGET = {"eigen": "Eigen3::Eigen", "nlohmann_json": "nlohmann_json::nlohmann_json", "xtensor": "xtensor"}


class Stub(ConanFile):
    package_type = "header-library"

    def package_id(self):
        self.info.clear()

    def package_info(self):
        self.cpp_info.includedirs = INCLUDE.get(self.name, [])
        self.cpp_info.bindirs, self.cpp_info.libdirs = [], []
        if self.name in TARGET:
            self.cpp_info.set_property("cmake_target_name", TARGET[self.name])
        if self.name == "sentencepiece":
            self.cpp_info.system_libs = ["sentencepiece"]

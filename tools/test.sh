#!/usr/bin/env bash
# Installs what is missing, builds, and runs all tests: those of the library, the same under sanitizers, the examples, the
# package, and the planted faults. The last lines say how long each stage took and what ctest counted.
# usage: tools/test.sh [ctest option...]     for example: tools/test.sh -R attention
set -euo pipefail
cd "$(dirname "$0")/.."

jobs=$(nproc)
stages=""
began=$SECONDS
stage() {  # stage NAME COMMAND...: runs it and notes its seconds
  local name=$1 start=$SECONDS result=0
  shift
  echo "== $name"
  "$@" || result=$?
  stages+=$(printf '%6d s  %s' $((SECONDS - start)) "$name")$'\n'
  return $result
}

build() {  # build PRESET
  cmake --preset "$1" >/dev/null && cmake --build --preset "$1" -j "$jobs"
}

# One ctest over all build trees, so that there is one list and one count.
run_tests() {
  mkdir -p build/all &&
    printf 'subdirs("%s")\n' "$PWD"/build/{dev,asan-ubsan,tsan,fuzz} >build/all/CTestTestfile.cmake &&
    ctest --test-dir build/all --output-on-failure --no-tests=error -j "$jobs" "$@" 2>&1 | tee build/all/output.txt
}

stage "set-up" tools/setup.sh --tests
stage "build" build dev
stage "build for AddressSanitizer and UndefinedBehaviorSanitizer" build asan-ubsan
stage "build for ThreadSanitizer" build tsan
stage "build of the fuzz targets" build fuzz
stage "build with planted faults" cmake --build --preset faults -j "$jobs"
# The device's part of the build above is for sm_90.
if [ -n "${CUDACXX-}" ] || command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
  stage "compile of the kernels for sm_80 and sm_100" build cuda-architectures
else
  echo "== no nvcc: nothing is compiled for CUDA, the kernels are tested in the emulator"
fi
status=0
stage "tests" run_tests "$@" || status=$?

echo "== seconds per stage"
printf '%s%6d s  in all\n' "$stages" $((SECONDS - began))
skipped=$(grep -c '\*\*\*Skipped' build/all/output.txt || true)
echo "$skipped tests skipped"
grep -E '^[0-9]+% tests passed, [0-9]+ tests failed out of [0-9]+' build/all/output.txt || echo "no tests were run"
exit "$status"

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

# The small trees: together, they fill what the last steps of a larger one leave idle.
build_small_trees() {
  build tsan && build fuzz && cmake --build --preset faults -j "$jobs" || return
  # The device's part of the build `dev` is for sm_90.
  if [ -n "${CUDACXX-}" ] || command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
    build cuda-architectures
  else
    echo "== no nvcc: nothing is compiled for CUDA, the kernels are tested in the emulator"
  fi
}
build_other_trees() {
  local small small_result=0 result=0
  mkdir -p build
  (renice -n 19 "$BASHPID" >/dev/null && build_small_trees) >build/small_trees.txt 2>&1 &
  small=$!
  build asan-ubsan || result=$?
  wait "$small" || small_result=$?
  cat build/small_trees.txt
  return $((result != 0 ? result : small_result))
}

# One ctest over all build trees, so that there is one list and one count.
run_tests() {
  mkdir -p build/all &&
    printf 'subdirs("%s")\n' "$PWD"/build/{dev,asan-ubsan,tsan,fuzz} >build/all/CTestTestfile.cmake &&
    ctest --test-dir build/all --output-on-failure --no-tests=error -j "$jobs" "$@" 2>&1 | tee build/all/output.txt
}

stage "set-up" tools/setup.sh --tests
stage "build" build dev
stage "build under sanitizers, of the fuzz targets, with planted faults, of kernels for sm_80 and sm_100" build_other_trees
status=0
stage "tests" run_tests "$@" || status=$?

echo "== seconds per stage"
printf '%s%6d s  in all\n' "$stages" $((SECONDS - began))
skipped=$(grep -c '\*\*\*Skipped' build/all/output.txt || true)
echo "$skipped tests skipped"
grep -E '^[0-9]+% tests passed, [0-9]+ tests failed out of [0-9]+' build/all/output.txt || echo "no tests were run"
exit "$status"

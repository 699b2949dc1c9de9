#!/bin/bash
# The peers that bench/compare measures, at pinned versions from PyPI, in DIR: install.sh DIR [--models TOKENIZER_MODEL]
# DIR/bin: PyTorch, OpenVINO, CTranslate2, onnxruntime. DIR/llama: llama.cpp built from its source package with this machine's instructions;
# DIR/llama-avx2: the same for AVX2. DIR/ik: ik_llama.cpp, where IK_LLAMA names a checkout of it (it is in no registry). --models also makes the random checkpoints and every peer's form of them (about 20 GB).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
directory=$(mkdir -p "$1" && cd "$1" && pwd)
python=${PYTHON:-python3}

"$python" -m venv "$directory"
"$directory/bin/pip" install -r "$here/requirements.txt"

# g++ 12 takes LDTILECFG to read 8 bytes of the 64 and drops the stores of the others, after which llama.cpp's AMX kernels fault: its two passes
# that drop stores are switched off.
export CXXFLAGS="-fno-dse -fno-tree-dse"
build_llama() {
  "$python" -m venv "$directory/$1"
  CMAKE_ARGS="$2" "$directory/$1/bin/pip" install --no-binary llama-cpp-python --no-cache-dir llama-cpp-python==0.3.36
}
build_llama llama "-DGGML_NATIVE=ON"
build_llama llama-avx2 "-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"

if [ -n "${IK_LLAMA:-}" ]; then
  cmake -S "$IK_LLAMA" -B "$directory/ik" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DCMAKE_CXX_FLAGS="$CXXFLAGS" -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_CURL=OFF
  cmake --build "$directory/ik" --target llama
  "${CXX:-c++}" -std=c++17 -O2 -I"$IK_LLAMA/include" -I"$IK_LLAMA/ggml/include" "$here/workers/ik_llama.cpp" -o "$directory/ik/ik_llama" \
    -L"$directory/ik/src" -L"$directory/ik/ggml/src" -lllama -lggml -Wl,-rpath,"$directory/ik/src:$directory/ik/ggml/src"
fi

if [ "${2:-}" = "--models" ]; then
  models=$directory/models
  "$directory/bin/python" "$here/make_models.py" --out "$models" --tokenizer "$3" llama-1.1b clip-l-336
  "$directory/bin/python" "$here/convert.py" gguf "$models/llama-1.1b"
  "$directory/llama/bin/python" "$here/convert.py" quantize "$models/llama-1.1b"
  "$directory/bin/python" "$here/convert.py" openvino "$models/llama-1.1b"
  "$directory/bin/python" "$here/convert.py" ctranslate2 "$models/llama-1.1b"
  "$directory/bin/python" "$here/convert.py" openvino-clip "$models/clip-l-336"
  "$directory/bin/python" "$here/convert.py" onnx-clip "$models/clip-l-336"
fi

#!/usr/bin/env bash
# Installs what is missing, builds m2lm-caption and captions a bundled picture.
# usage: tools/demo.sh [argument of m2lm-caption...]
set -euo pipefail
cd "$(dirname "$0")/.."

tools/setup.sh
cmake --preset release >/dev/null
cmake --build --preset release -j "$(nproc)"
if [ $# -eq 0 ]; then
  set -- assets/easy-vqa/pictures/0.png
fi
exec build/release/bin/m2lm-caption "$@"

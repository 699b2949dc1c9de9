#!/usr/bin/env bash
# Installs the Debian or Ubuntu packages that building m2lm needs, those that are missing only.
# usage: tools/setup.sh [--tests]     --tests: also what the tests need
set -euo pipefail

packages=(g++ cmake ninja-build libeigen3-dev nlohmann-json3-dev libsentencepiece-dev libstb-dev libcli11-dev)
case "${1-}" in
  "") ;;
  --tests) packages+=(clang libclang-rt-dev doctest-dev python3 python3-venv libxtensor-dev pkg-config gdb doxygen g++-aarch64-linux-gnu qemu-user
    valgrind libbenchmark-dev) ;;
  *) sed -n '2,3s/^# //p' "$0" >&2; exit 2 ;;
esac

missing=()
for package in "${packages[@]}"; do
  dpkg-query --show --showformat='${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "tools/setup.sh: run as root, or install sudo: missing ${missing[*]}" >&2; exit 1; }
  as_root=(sudo)
fi
echo "installing ${missing[*]}"
apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@"; }
apt update
apt install -y --no-install-recommends "${missing[@]}" >/dev/null

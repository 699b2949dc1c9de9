#!/usr/bin/env bash
# A compiler that spends no time on the project: for each of its sources it compiles an empty program. What is built, linked and installed,
# and where, is as ever. M2LM_STUB_COMPILER is the real one, M2LM_STUB_SOURCES the directory whose sources are left out.
words=()
for word in "$@"; do
  case "$word" in
    "$M2LM_STUB_SOURCES"/*.cpp) words+=("$(dirname "$0")/stub.cpp") ;;
    *) words+=("$word") ;;
  esac
done
exec "$M2LM_STUB_COMPILER" "${words[@]}"

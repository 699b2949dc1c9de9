#!/usr/bin/env python3
"""A compiler launcher: runs nvcc with -Xptxas -v, and keeps what ptxas says of each kernel in OBJECT.ptxas."""

import subprocess
import sys

command = sys.argv[1:]
result = subprocess.run([*command, "-Xptxas", "-v"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
said, kept = [], []
for line in result.stdout.splitlines(keepends=True):
    (kept if line.startswith("ptxas info") or "bytes stack frame" in line else said).append(line)
sys.stdout.writelines(said)
if result.returncode == 0:
    with open(command[command.index("-o") + 1] + ".ptxas", "w", encoding="utf-8") as file:
        file.writelines(kept)
sys.exit(result.returncode)

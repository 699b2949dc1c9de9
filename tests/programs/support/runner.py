"""What the tests of the programs share: running one, the models to run it with, safetensors, skipping."""

import array
import json
import os
import pathlib
import struct
import subprocess
import sys
import unittest

ROOT = pathlib.Path(os.environ.get("M2LM_SOURCE_DIR", pathlib.Path(__file__).resolve().parents[3])).resolve()
BIN = pathlib.Path(os.environ.get("M2LM_BIN_DIR", ROOT / "build" / "dev" / "bin")).resolve()
ASSETS = pathlib.Path(os.environ.get("M2LM_ASSETS", ROOT.parent / "shared" / "assets"))
BUNDLED = ROOT / "assets" / "easy-vqa"
TINY = ROOT / "tests" / "golden" / "llava" / "with_tokenizer"  # random weights, but a whole LLaVA checkpoint
PICTURE = TINY / "picture.png"
SKIPPED = 77  # ctest's SKIP_RETURN_CODE


class Result:
    def __init__(self, completed):
        self.status = completed.returncode
        self.bytes = completed.stdout
        self.out = completed.stdout.decode("utf-8")
        self.err = completed.stderr.decode("utf-8")

    def lines(self):
        """Standard output as one JSON object per line."""
        return [json.loads(line) for line in self.out.splitlines()]


def run(program, *arguments, stdin="", environment=None, executable=None):
    variables = {k: v for k, v in os.environ.items() if k not in ("M2LM_MODEL", "M2LM_MAX_ISA")}
    variables.update(environment or {})
    command = [str(executable or BIN / program), *map(str, arguments)]
    return Result(subprocess.run(command, input=stdin.encode(), capture_output=True, timeout=600, check=False, env=variables))


def read_safetensors(path):
    """{name: (dtype, shape, values)}"""
    data = pathlib.Path(path).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        values = array.array({"F32": "f", "I32": "i"}[entry["dtype"]])
        values.frombytes(data[8 + length + begin:8 + length + end])
        tensors[name] = (entry["dtype"], entry["shape"], values)
    return tensors


def relative_difference(ours, theirs):
    """max |a - b| / max |b|"""
    return max(abs(a - b) for a, b in zip(ours, theirs)) / max(abs(b) for b in theirs)


def need(path):
    """Skips the test, visibly, unless `path` is there."""
    if not pathlib.Path(path).exists():
        raise unittest.SkipTest(f"no {path}")


def main():
    result = unittest.main(exit=False, verbosity=2).result
    for _, reason in result.skipped:
        print(f"SKIPPED: {reason}")
    if not result.wasSuccessful() or result.testsRun == 0:
        sys.exit(1)
    sys.exit(SKIPPED if result.skipped else 0)

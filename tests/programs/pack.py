#!/usr/bin/env python3
"""m2lm-pack: the other programs say the same with its file, and say so when it does not fit any more."""

import os
import pathlib
import shutil
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "support"))
from runner import main, run  # noqa: E402

MODEL = pathlib.Path(__file__).resolve().parents[2] / "assets/easy-vqa"


class Pack(unittest.TestCase):
    def setUp(self):
        self.directory = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.directory)
        self.model = self.directory / "model"
        shutil.copytree(MODEL, self.model)

    def answer(self, precision, *arguments):
        return run("m2lm-vqa", "--model", self.model, "--image", self.model / "pictures/0.png", "--question", "What shape is in the image?", "--precision",
                   precision, "--seed", 1, *arguments)

    def test_answers_are_the_same_with_the_file(self):
        for precision in ("bf16", "q4_128", "w8a8"):
            before = self.answer(precision)
            result = run("m2lm-pack", "--model", self.model, "--precision", precision)
            file = self.model / f"m2lm-packed.cpu.{precision}.safetensors"
            self.assertEqual(result.status, 0, result.err)
            self.assertIn(f"{file}: ", result.out)
            self.assertIn(" packed matrices", result.out)
            self.assertTrue(file.is_file())
            for arguments in ((), ("--check",), ("--packed-cache", file)):
                after = self.answer(precision, *arguments)
                self.assertEqual((after.status, after.out, after.err), (0, before.out, before.err))

    def test_a_file_that_does_not_fit_any_more(self):
        elsewhere = self.directory / "packed.safetensors"
        self.assertEqual(run("m2lm-pack", "--model", self.model, "--precision", "q8", "--output", elsewhere).status, 0)
        self.assertEqual(run("m2lm-pack", "--model", self.model, "--precision", "q8").status, 0)
        before = self.answer("q8")
        self.assertEqual(before.err, "")
        os.utime(self.model / "model.safetensors", (1, 1))
        after = self.answer("q8")
        self.assertEqual((after.status, after.out), (0, before.out))
        self.assertIn("m2lm-vqa: packed weights are not used: ", after.err)
        self.assertIn("they have changed since", after.err)
        refused = self.answer("q8", "--packed-cache", elsewhere)
        self.assertEqual(refused.status, 1)
        self.assertIn(str(elsewhere), refused.err)

    def test_errors(self):
        result = run("m2lm-pack", "--model", self.directory / "nowhere")
        self.assertEqual(result.status, 1)
        self.assertIn("there is no directory", result.err)
        self.assertEqual(run("m2lm-pack").status, 2)
        result = run("m2lm-pack", "--model", self.model, "--output", self.directory / "no/such/place")
        self.assertEqual(result.status, 1)
        self.assertIn("no/such/place", result.err)


if __name__ == "__main__":
    main()

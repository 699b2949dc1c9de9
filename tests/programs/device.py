#!/usr/bin/env python3
"""--device: on a machine with a usable device and one without, in a build with CUDA and one without."""

import pathlib
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "support"))
from runner import PICTURE, TINY, main, run  # noqa: E402

COMMANDS = [("m2lm-caption", "--model", TINY, "--max-tokens", "4", PICTURE),
            ("m2lm-vqa", "--model", TINY, "--max-tokens", "4", "--image", PICTURE, "--question", "What?")]


class Device(unittest.TestCase):
    def test_cpu_is_the_default(self):
        for command in COMMANDS:
            plain, chosen = run(*command), run(*command, "--device", "cpu")
            self.assertEqual((plain.status, plain.err), (0, ""))
            self.assertEqual((chosen.status, chosen.err, chosen.out), (0, "", plain.out))

    def test_help_and_wrong_names(self):
        for command in COMMANDS:
            self.assertIn("--device", run(command[0], "--help").out)
            wrong = run(*command, "--device", "tpu")
            self.assertEqual((wrong.status, wrong.out), (2, ""))
            self.assertIn("--device", wrong.err)

    def test_auto_and_cuda_agree(self):
        """Where auto uses the CPU it says why, and cuda fails with the same reason; else both answer from the device."""
        for command in COMMANDS:
            auto, cuda = run(*command, "--device", "auto"), run(*command, "--device", "cuda")
            self.assertEqual(auto.status, 0, auto.err)
            if auto.err:
                self.assertEqual(auto.out, run(*command).out)
                self.assertRegex(auto.err, rf"\A{command[0]}: --device auto: the CPU is used, as .+\n\Z")
                reason = auto.err.partition(", as ")[2].strip()
                self.assertEqual((cuda.status, cuda.out), (1, ""))
                self.assertEqual(cuda.err, f"{command[0]}: --device cuda: {reason}\n")
            else:
                self.assertEqual((cuda.status, cuda.err, cuda.out), (0, "", auto.out))


if __name__ == "__main__":
    main()

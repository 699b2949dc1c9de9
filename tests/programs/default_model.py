#!/usr/bin/env python3
"""Where the programs find their model when none is given: from the executable's own place, never from where it was built."""

import os
import pathlib
import shutil
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "support"))
from runner import BIN, PICTURE, ROOT, TINY, main, run  # noqa: E402


class DefaultModel(unittest.TestCase):
    def setUp(self):
        self.top = pathlib.Path(tempfile.mkdtemp()).resolve()
        self.addCleanup(shutil.rmtree, self.top)
        self.want = run("m2lm-caption", "--model", TINY, "--max-tokens", "8", PICTURE).out
        self.assertTrue(self.want.strip())

    def place(self, program_at, model_at):
        """A tree with a copy of the program, and one of the model."""
        executable = self.top / program_at / "m2lm-caption"
        executable.parent.mkdir(parents=True)
        shutil.copy2(BIN / "m2lm-caption", executable)
        if model_at:
            shutil.copytree(TINY, self.top / model_at)
        return executable

    def caption(self, executable, **options):
        return run("", "--max-tokens", "8", PICTURE, executable=executable, **options)

    def finds(self, program_at, model_at):
        executable = self.place(program_at, model_at)
        result = self.caption(executable)
        self.assertEqual((result.status, result.err, result.out), (0, "", self.want))
        return executable

    def test_installed(self):
        self.finds("usr/bin", "usr/share/m2lm/easy-vqa")

    def test_build_directory_in_a_source_tree(self):
        self.finds("project/build/dev/bin", "project/assets/easy-vqa")

    def test_beside_the_program(self):
        self.finds("unpacked", "unpacked/assets/easy-vqa")

    def test_through_a_symbolic_link(self):
        executable = self.finds("opt/m2lm/bin", "opt/m2lm/share/m2lm/easy-vqa")
        link = self.top / "elsewhere" / "caption"
        link.parent.mkdir()
        link.symlink_to(executable)
        self.assertEqual(self.caption(link).out, self.want)

    def test_none_is_an_error_that_says_what_to_do(self):
        result = self.caption(self.place("bin", None))
        self.assertEqual((result.status, result.out), (1, ""))
        for piece in ("--model", "M2LM_MODEL", "assets/easy-vqa", str(self.top / "bin")):
            self.assertIn(piece, result.err)

    def test_environment_variable(self):
        executable = self.place("bin", None)
        self.assertEqual(self.caption(executable, environment={"M2LM_MODEL": str(TINY)}).out, self.want)
        # The option comes before the variable, the variable before the place.
        broken = {"M2LM_MODEL": str(self.top / "nothing")}
        self.assertEqual(run("", "--model", TINY, "--max-tokens", "8", PICTURE, executable=executable, environment=broken).out, self.want)
        shutil.copytree(TINY, self.top / "assets" / "easy-vqa")
        self.assertEqual(self.caption(executable, environment=broken).status, 1)

    def test_no_source_path_is_compiled_in(self):
        for program in ("m2lm-caption", "m2lm-vqa", "m2lm-generate"):
            content = (BIN / program).read_bytes()
            for place in ("assets/easy-vqa", "share/m2lm/easy-vqa"):
                self.assertNotIn(os.fsencode(ROOT / place), content, program)


if __name__ == "__main__":
    main()

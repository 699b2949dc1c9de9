#!/usr/bin/env python3
"""What the documents show is true: code is in an example that compiles, links lead somewhere, sentences of errors exist."""

import pathlib
import re
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "support"))
from runner import ROOT, main  # noqa: E402

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


class Documents(unittest.TestCase):
    def test_code_of_own_component_is_in_the_examples(self):
        sources = [ROOT / "examples" / name for name in ("own_encoder.cpp", "own_projector.cpp")] + sorted((ROOT / "tests" / "seams").glob("*.hpp"))
        examples = "\n".join(source.read_text() for source in sources)
        blocks = re.findall(r"^```cpp\n(.*?)^```", (ROOT / "docs" / "own_component.md").read_text(), re.MULTILINE | re.DOTALL)
        self.assertGreaterEqual(len(blocks), 13)
        for block in blocks:
            self.assertIn(block.strip(), examples)

    def test_code_is_in_its_example(self):
        for document, example, least in (("training.md", "finetune.cpp", 4), ("answers.md", "answers.cpp", 4)):
            code = (ROOT / "examples" / example).read_text()
            blocks = re.findall(r"^```cpp\n(.*?)^```", (ROOT / "docs" / document).read_text(), re.MULTILINE | re.DOTALL)
            self.assertGreaterEqual(len(blocks), least, document)
            for block in blocks:
                self.assertIn(block.strip(), code)

    def test_models_of_the_seams_are_small(self):
        models = sorted((ROOT / "tests" / "seams").glob("*.hpp"))
        self.assertEqual(len(models), 5)
        for model in models:
            self.assertLessEqual(len(model.read_text().splitlines()), 60, model.name)

    def test_ways_of_consuming_the_package_are_those_that_are_tested(self):
        registered = " ".join(re.findall(r"^m2lm_packaging_tests\(\S+ ([\w ]+)\)$", (ROOT / "tests" / "CMakeLists.txt").read_text(), re.MULTILINE)).split()
        self.assertGreaterEqual(len(registered), 13)
        named = re.findall(r"`packaging\.(\w+)`", (ROOT / "docs" / "packaging.md").read_text())
        self.assertEqual(sorted(registered), sorted(set(named)))

    def test_links(self):
        for document in DOCUMENTS:
            prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
            for target in re.findall(r"\]\(([^)#]+)\)", prose):
                if not target.startswith(("http://", "https://")):
                    self.assertTrue((document.parent / target).exists(), f"{document.name}: {target}")

    def test_named_files_exist(self):
        for document in DOCUMENTS:
            for path in re.findall(r"`((?:tests|examples|tools|docs|include)/[\w./-]+)`", document.read_text()):
                if "NAME" not in path:
                    self.assertTrue((ROOT / path).exists(), f"{document.name}: {path}")


if __name__ == "__main__":
    main()

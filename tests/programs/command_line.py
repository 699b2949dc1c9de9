#!/usr/bin/env python3
"""Exit codes, what goes to which stream, wrong options, and files that cannot be used."""

import json
import pathlib
import shutil
import struct
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "support"))
from runner import PICTURE, TINY, main, run  # noqa: E402

TEMPLATES = ["plain", "vicuna_v1", "user_assistant", "mistral", "llama-2"]


class CommandLine(unittest.TestCase):
    def setUp(self):
        self.directory = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.directory)

    def file(self, name, content):
        path = self.directory / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def fails(self, status, pieces, program, *arguments, **options):
        """The program ends with `status`, says all `pieces` on standard error, and prints nothing else."""
        result = run(program, *arguments, **options)
        self.assertEqual(result.status, status, result.err)
        self.assertEqual(result.out, "")
        self.assertTrue(result.err.startswith(program + ": "), result.err)
        for piece in pieces:
            self.assertIn(str(piece), result.err)
        return result

    def caption(self, *arguments):
        return ("m2lm-caption", "--model", TINY, "--max-tokens", "4", *arguments)

    def vqa(self, *arguments):
        return ("m2lm-vqa", "--model", TINY, "--max-tokens", "4", *arguments)

    def test_help_and_version(self):
        for program in ("m2lm-caption", "m2lm-vqa", "m2lm-generate"):
            for option in ("--help", "-h"):
                result = run(program, option)
                self.assertEqual((result.status, result.err), (0, ""))
                for name in ("--model", "--precision", "--max-tokens", "--temperature", "--seed", "--threads", "--json", "--timings", "--dump",
                             "--template", "--check"):
                    self.assertIn(name, result.out)
            result = run(program, "--version")
            self.assertEqual((result.status, result.err), (0, ""))
            self.assertRegex(result.out, rf"^{program} \d+\.\d+\.\d+\n$")

    def test_success_writes_nothing_to_standard_error(self):
        result = run(*self.caption(PICTURE))
        self.assertEqual((result.status, result.err), (0, ""))
        self.assertTrue(result.out.endswith("\n"))
        self.assertNotIn("\r", result.out)

    def test_timings_go_to_standard_error(self):
        plain, timed = run(*self.caption(PICTURE)), run(*self.caption("--timings", PICTURE))
        self.assertEqual(plain.bytes, timed.bytes)
        for pattern in (r"(?m)^load +[\d.]+ s", r"(?m)^image +[\d.]+ s", r"(?m)^prefill +[\d.]+ tok/s", r"(?m)^decode +[\d.]+ tok/s",
                        r"(?m)^memory +[\d.]+ MiB"):
            self.assertRegex(timed.err, pattern)

    def test_wrong_usage(self):
        for arguments in (self.caption(), self.caption("--no-such-option", PICTURE), self.caption("--precision", "int4", PICTURE),
                          self.caption("--max-tokens", "many", PICTURE), self.caption("--max-tokens", "-1", PICTURE),
                          self.caption("--threads", "-1", PICTURE), self.caption("--temperature", "hot", PICTURE),
                          self.caption("--dump", self.directory / "x.safetensors", PICTURE, PICTURE),
                          self.vqa("--question", "What?"), self.vqa("--image", PICTURE, "--question", "What?", "--questions", "file"),
                          self.vqa("--image", PICTURE, "--dump", self.directory / "x.safetensors"),
                          ("m2lm-generate", "--model", TINY), ("m2lm-generate", "--prompt", "x")):
            with self.subTest(arguments=arguments[1:]):
                self.fails(2, ["--help"], *arguments)

    def test_values_outside_their_range(self):
        for option, value in (("--temperature", "-1"), ("--top-k", "-1"), ("--top-p", "1.5"), ("--min-p", "-0.1"), ("--repetition-penalty", "0")):
            with self.subTest(option=option):
                self.fails(2, [option[2:].replace("-", "_"), value], *self.caption(option, value, PICTURE))

    def test_unknown_template_lists_the_known(self):
        self.fails(2, ["no-such", *TEMPLATES], *self.caption("--template", "no-such", PICTURE))

    def test_known_templates(self):
        for name in TEMPLATES:
            with self.subTest(template=name):
                self.assertEqual(run(*self.caption("--template", name, PICTURE)).status, 0)

    def test_missing_files(self):
        missing = self.directory / "missing"
        self.fails(1, [missing], *self.caption(missing))
        self.fails(1, [missing], *self.vqa("--image", missing, "--question", "What?"))
        self.fails(1, [missing], *self.vqa("--image", PICTURE, "--questions", missing))
        self.fails(1, [missing], "m2lm-caption", "--model", missing, PICTURE)
        self.fails(1, ["config.json"], "m2lm-caption", "--model", self.directory, PICTURE)

    def test_pictures_that_cannot_be_used(self):
        for name, content in (("empty.png", b""), ("text.png", b"this is no picture"), ("cut.png", PICTURE.read_bytes()[:100])):
            with self.subTest(picture=name):
                self.fails(1, [name], *self.caption(self.file(name, content)))

    def test_a_bad_picture_among_good_ones(self):
        bad = self.file("bad.png", b"")
        result = run(*self.caption(PICTURE, bad, PICTURE, "--json"))
        self.assertEqual(result.status, 1)
        self.assertEqual(len(result.lines()), 2)
        self.assertIn(str(bad), result.err)

    def test_question_files_that_cannot_be_used(self):
        for name, content, line in (("broken.jsonl", '{"question": "a"}\n{"question": \n', 2), ("list.jsonl", '["question"]\n', 1),
                                    ("keyless.jsonl", '{"question": "a"}\n\n{"text": "b"}\n', 3), ("number.jsonl", '{"question": 1}\n', 1)):
            with self.subTest(file=name):
                self.fails(1, [name, f"line {line}"], *self.vqa("--image", PICTURE, "--questions", self.file(name, content)))

    def test_questions_without_a_picture(self):
        file = self.file("q.jsonl", '{"question": "a", "image": "a.png"}\n{"question": "b"}\n')
        self.fails(2, ["--image", "question 2"], *self.vqa("--questions", file))

    def test_a_prompt_longer_than_the_context(self):
        self.fails(1, ["positions", "context"], *self.caption("--prompt", "very " * 5000, PICTURE))

    def test_a_placeholder_of_ones_own(self):
        self.fails(1, ["<image>"], *self.caption("--prompt", "<image> and <image>?", PICTURE))

    def test_damaged_checkpoint(self):
        broken = self.directory / "broken"
        shutil.copytree(TINY, broken)
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
        self.fails(1, ["model.safetensors"], "m2lm-caption", "--model", broken, PICTURE)
        (broken / "config.json").write_text("{")
        self.fails(1, ["config.json"], "m2lm-caption", "--model", broken, PICTURE)

    def test_check_names_weights_that_are_not_finite(self):
        result = run(*self.caption("--check", PICTURE))
        self.assertEqual((result.status, result.err), (0, ""))
        damaged = self.directory / "nan"
        shutil.copytree(TINY, damaged)
        weights = damaged / "model.safetensors"
        data = bytearray(weights.read_bytes())
        length = struct.unpack_from("<Q", data)[0]
        header = json.loads(data[8:8 + length])
        name, entry = next((name, entry) for name, entry in sorted(header.items()) if name.endswith("norm.weight"))
        self.assertEqual(entry["dtype"], "F32")
        struct.pack_into("<f", data, 8 + length + entry["data_offsets"][0] + 4, float("nan"))
        weights.write_bytes(data)
        self.fails(1, ["not finite", name, "[1]", "NaN", "model.safetensors"], "m2lm-caption", "--model", damaged, "--check", PICTURE)

    def test_dump_to_a_place_that_is_not_there(self):
        self.fails(1, ["nowhere"], *self.caption("--dump", self.directory / "nowhere" / "x.safetensors", PICTURE))

    def test_full_standard_output(self):
        if not pathlib.Path("/dev/full").exists():
            self.skipTest("no /dev/full")
        import subprocess
        from runner import BIN
        with open("/dev/full", "wb") as full:
            result = subprocess.run([str(BIN / "m2lm-caption"), "--model", str(TINY), str(PICTURE)], stdout=full, stderr=subprocess.PIPE, check=False)
        self.assertEqual(result.returncode, 1)
        self.assertIn(b"standard output", result.stderr)


if __name__ == "__main__":
    main()

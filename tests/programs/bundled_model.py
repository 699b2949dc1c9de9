#!/usr/bin/env python3
"""The bundled model answers the bundled questions and captions the bundled pictures, in both precisions, on any clone."""

import json
import os
import pathlib
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "support"))
from runner import BUNDLED, main, run  # noqa: E402

QUESTIONS = BUNDLED / "questions.jsonl"


class BundledModel(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.questions = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]

    def test_there_is_enough_to_ask(self):
        self.assertEqual(len({q["image"] for q in self.questions}), 20)
        self.assertGreaterEqual(len(self.questions), 100)

    def test_every_question(self):
        for precision in ("f32", "bf16"):
            for threads in ("1", "2"):
                with self.subTest(precision=precision, threads=threads):
                    result = run("m2lm-vqa", "--model", BUNDLED, "--questions", QUESTIONS, "--precision", precision, "--threads", threads, "--json")
                    self.assertEqual((result.status, result.err), (0, ""))
                    lines = result.lines()
                    self.assertEqual([line["question"] for line in lines], [q["question"] for q in self.questions])
                    wrong = [(q["image"], q["question"], q["answer"], line["answer"]) for q, line in zip(self.questions, lines)
                             if line["answer"].strip() != q["answer"]]
                    self.assertEqual(wrong, [])
                    self.assertEqual({line["finish_reason"] for line in lines}, {"stop_token"})

    def test_captions(self):
        for question in self.questions:
            if question["question"] != "Describe the image.":
                continue
            result = run("m2lm-caption", "--model", BUNDLED, BUNDLED / question["image"])
            self.assertEqual((result.status, result.err, result.out.strip()), (0, "", question["answer"]))

    def test_a_conversation_about_one_picture(self):
        image = self.questions[0]["image"]
        [answer] = [q["answer"] for q in self.questions if q["image"] == image and q["question"] == "What shape is in the image?"]
        result = run("m2lm-vqa", "--model", BUNDLED, "--image", BUNDLED / image, stdin="What shape is in the image?\nwhat color is the shape?\n")
        self.assertEqual((result.status, result.err), (0, ""))
        lines = result.out.splitlines()
        self.assertEqual((len(lines), lines[0].strip()), (2, answer))

    def test_size(self):
        total = sum(os.path.getsize(path) for path in BUNDLED.rglob("*") if path.is_file())
        self.assertLessEqual(total, 6 << 20)


if __name__ == "__main__":
    main()

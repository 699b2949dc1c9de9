#!/usr/bin/env python3
"""What the programs print and write: JSON, streamed text, dumps, seeds, conversations; against transformers where recorded."""

import json
import pathlib
import shutil
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "support"))
from runner import ASSETS, PICTURE, TINY, main, need, read_safetensors, relative_difference, run  # noqa: E402

GOLDEN = json.loads((TINY / "golden.json").read_text())
QUESTION = GOLDEN["question"]


class Output(unittest.TestCase):
    def setUp(self):
        self.directory = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.directory)

    def good(self, program, *arguments, **options):
        result = run(program, *arguments, **options)
        self.assertEqual(result.status, 0, result.err)
        return result

    def vqa(self, *arguments, **options):
        return self.good("m2lm-vqa", "--model", TINY, "--image", PICTURE, *arguments, **options)

    def test_answer_equals_transformers(self):
        count = len(GOLDEN["greedy_ids"])
        for threads in ("1", "2"):
            [line] = self.vqa("--question", QUESTION, "--precision", "f32", "--max-tokens", count, "--threads", threads, "--json").lines()
            self.assertEqual(line["tokens"], GOLDEN["greedy_ids"])
            self.assertEqual(line["answer"], GOLDEN["greedy_text"])

    def test_json_of_an_answer(self):
        [line] = self.vqa("--question", QUESTION, "--max-tokens", "5", "--json").lines()
        self.assertEqual(list(line), ["question", "answer", "tokens", "finish_reason", "timings"])
        self.assertEqual((line["question"], len(line["tokens"]), line["finish_reason"]), (QUESTION, 5, "length"))
        timings = line["timings"]
        self.assertEqual((timings["prefill_tokens"], timings["decode_tokens"]), (len(GOLDEN["input_ids"]), 4))
        for name in ("image_seconds", "prefill_seconds", "decode_seconds"):
            self.assertGreater(timings[name], 0)

    def test_json_quotes_what_must_be_quoted(self):
        question = 'a "quoted" \\ line\twith\nall: é 猫 \x01'
        [line] = self.vqa("--question", question, "--max-tokens", "2", "--json").lines()
        self.assertEqual(line["question"], question)

    def test_streamed_text_equals_the_whole(self):
        for more in ([], ["--temperature", "1", "--seed", "5"], ["--precision", "f32"]):
            [line] = self.vqa("--question", QUESTION, "--max-tokens", "60", "--json", *more).lines()
            text = self.vqa("--question", QUESTION, "--max-tokens", "60", *more)
            self.assertEqual(text.out, line["answer"] + "\n")

    def test_seeds(self):
        def sample(seed):
            [line] = self.vqa("--question", QUESTION, "--max-tokens", "20", "--temperature", "1.5", "--seed", seed, "--json").lines()
            return line["tokens"]
        self.assertEqual(sample(11), sample(11))
        self.assertNotEqual(sample(11), sample(12))

    def test_stop_text(self):
        answer = GOLDEN["greedy_text"]
        stop = answer[4:6]
        [line] = self.vqa("--question", QUESTION, "--precision", "f32", "--max-tokens", "16", "--stop", "no such text", "--stop", stop, "--json").lines()
        self.assertEqual((line["answer"], line["finish_reason"]), (answer[:answer.index(stop)], "stop_string"))

    def test_no_tokens(self):
        self.assertEqual(self.vqa("--question", QUESTION, "--max-tokens", "0").out, "\n")

    def test_captions(self):
        [line] = self.good("m2lm-caption", "--model", TINY, "--prompt", QUESTION, "--precision", "f32", "--max-tokens", "16", "--json", PICTURE).lines()
        self.assertEqual((line["image"], line["caption"]), (str(PICTURE), GOLDEN["greedy_text"]))
        one = self.good("m2lm-caption", "--model", TINY, "--max-tokens", "8", PICTURE).out
        two = self.good("m2lm-caption", "--model", TINY, "--max-tokens", "8", PICTURE, PICTURE).out
        self.assertEqual(two, 2 * f"{PICTURE}: {one}")

    def test_questions_of_a_file(self):
        shutil.copy(PICTURE, self.directory / "a.png")
        file = self.directory / "questions.jsonl"
        file.write_text(f'{{"question": {json.dumps(QUESTION)}}}\n\n{{"question": "b", "image": "a.png"}}\n'
                        '{"question": "c", "image": ["a.png", "a.png"], "answer": "left alone"}\n')
        lines = self.vqa("--questions", file, "--precision", "f32", "--max-tokens", "16", "--json").lines()
        self.assertEqual([line["question"] for line in lines], [QUESTION, "b", "c"])
        self.assertEqual(lines[0]["answer"], GOLDEN["greedy_text"])
        self.assertNotIn("image", lines[0])
        self.assertEqual(lines[1]["image"], str(self.directory / "a.png"))
        self.assertEqual(len(lines[2]["image"]), 2)
        # A picture is encoded once.
        self.assertEqual([line["timings"]["image_seconds"] > 0.00002 for line in lines], [True, True, False])
        alone = self.vqa("--question", "b", "--precision", "f32", "--max-tokens", "16", "--json").lines()
        self.assertEqual(alone[0]["tokens"], lines[1]["tokens"])
        plain = self.vqa("--questions", file, "--precision", "f32", "--max-tokens", "16").out
        self.assertEqual(plain, "".join(line["answer"] + "\n" for line in lines))

    def test_conversation(self):
        lines = self.vqa("--precision", "f32", "--max-tokens", "16", "--json", stdin=f"{QUESTION}\n\nAnd now?\r\nlast, without a newline").lines()
        self.assertEqual([line["question"] for line in lines], [QUESTION, "And now?", "last, without a newline"])
        self.assertEqual(lines[0]["answer"], GOLDEN["greedy_text"])
        # The picture and the first turn are not computed again.
        self.assertEqual(lines[0]["timings"]["prefill_tokens"], len(GOLDEN["input_ids"]))
        self.assertLess(lines[1]["timings"]["prefill_tokens"], len(GOLDEN["input_ids"]))
        self.assertEqual(self.vqa("--precision", "f32", "--max-tokens", "16", stdin=QUESTION + "\n").out, GOLDEN["greedy_text"] + "\n")
        self.assertEqual(self.vqa(stdin="").out, "")

    def test_dump_equals_transformers(self):
        path = self.directory / "dump.safetensors"
        self.vqa("--question", QUESTION, "--precision", "f32", "--max-tokens", "1", "--dump", path)
        ours, theirs = read_safetensors(path), read_safetensors(TINY / "golden.safetensors")
        layers = sorted(name for name in theirs if name.startswith("hidden_states."))
        self.assertEqual(sorted(ours), sorted(["input_ids", "features.image.0", "logits", *layers]))
        self.assertEqual((ours["input_ids"][0], list(ours["input_ids"][2])), ("I32", GOLDEN["input_ids"]))
        self.assertEqual(ours["features.image.0"][1], theirs["features"][1][1:])
        self.assertLess(relative_difference(ours["features.image.0"][2], theirs["features"][2]), 1e-4)
        for name in ["logits", *layers]:
            self.assertEqual(ours[name][:2], theirs[name][:2], name)
            self.assertLess(relative_difference(ours[name][2], theirs[name][2]), 1e-4, name)

    def test_dump_of_two_pictures(self):
        path = self.directory / "dump.safetensors"
        self.vqa("--image", PICTURE, "--question", "Equal?", "--max-tokens", "1", "--dump", path)
        dump = read_safetensors(path)
        self.assertEqual(dump["features.image.0"], dump["features.image.1"])
        tokens = dump["input_ids"][1][0]
        self.assertEqual(dump["logits"][1], [tokens, 352])

    def test_dump_of_a_caption(self):
        path = self.directory / "dump.safetensors"
        self.good("m2lm-caption", "--model", TINY, "--max-tokens", "1", "--dump", path, PICTURE)
        self.assertIn("features.image.0", read_safetensors(path))


class TextModel(unittest.TestCase):
    def test_stories(self):
        """A real text model, put together from its weights and LLaMA's tokenizer."""
        source, golden = ASSETS / "llama" / "stories15M-hf", ASSETS / "golden" / "stories15M"
        for path in (source / "model.safetensors", ASSETS / "llama" / "tokenizer.model", golden):
            need(path)
        with tempfile.TemporaryDirectory() as directory:
            for file in [*source.iterdir(), ASSETS / "llama" / "tokenizer.model"]:
                shutil.copyfile(file, pathlib.Path(directory) / file.name)
            arguments = ["m2lm-generate", "--model", directory, "--prompt", "Once upon a time", "--max-tokens", "24"]
            text = run(*arguments)
            self.assertEqual((text.status, text.err), (0, ""))
            self.assertIn("there was a little", text.out)
            [line] = run(*arguments, "--json").lines()
            self.assertEqual(list(line), ["prompt", "text", "tokens", "finish_reason", "timings"])
            self.assertEqual((line["text"] + "\n", len(line["tokens"])), (text.out, 24))
            dump = pathlib.Path(directory) / "dump.safetensors"
            self.assertEqual(run(*arguments, "--dump", dump).status, 0)
            config = json.loads((source / "config.json").read_text())
            tensors = read_safetensors(dump)
            layers = config["num_hidden_layers"] + 1
            self.assertEqual(sorted(tensors), sorted(["input_ids", "logits", *(f"hidden_states.{i}" for i in range(layers))]))
            self.assertEqual(tensors["logits"][1], [tensors["input_ids"][1][0], config["vocab_size"]])


if __name__ == "__main__":
    main()

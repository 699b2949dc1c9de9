#!/usr/bin/env python3
"""m2lm-bench on random checkpoints of a few weights: what it prints, and that what it times is what it says."""

import json
import pathlib
import shutil
import struct
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "support"))
from runner import main, read_safetensors, relative_difference, run  # noqa: E402

TEXT = ("--random", "llama-1.1b", "--hidden", 64, "--intermediate", 96, "--layers", 2, "--heads", 4, "--kv-heads", 2, "--vocabulary", 100)
VISION = ("--random", "clip-l14-336", "--hidden", 32, "--intermediate", 64, "--layers", 2, "--heads", 2)


class Bench(unittest.TestCase):
    def setUp(self):
        self.directory = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.directory)

    def bench(self, *arguments, **options):
        result = run("m2lm-bench", *arguments, **options)
        self.assertEqual((result.status, result.err), (0, ""))
        return result

    def write(self, *random):
        self.bench(*random, "--write-checkpoint", self.directory)
        data = (self.directory / "model.safetensors").read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        return json.loads((self.directory / "config.json").read_text()), json.loads(data[8:8 + length])

    def test_random_checkpoints_have_the_dims(self):
        config, tensors = self.write(*TEXT)
        self.assertEqual((config["hidden_size"], config["num_hidden_layers"], config["num_key_value_heads"], config["vocab_size"]), (64, 2, 2, 100))
        self.assertEqual(tensors["model.layers.1.self_attn.k_proj.weight"]["shape"], [32, 64])
        self.assertEqual({t["dtype"] for t in tensors.values()}, {"BF16"})
        config, tensors = self.write(*VISION)
        self.assertEqual(config["model_type"], "clip_vision_model")
        self.assertEqual(tensors["vision_model.embeddings.position_embedding.weight"]["shape"], [577, 32])
        self.assertIn("vision_model.post_layernorm.bias", tensors)
        self.assertEqual(tensors["visual_projection.weight"]["shape"], [768, 32])

    def test_json_of_every_test(self):
        machine, *tests = self.bench(*TEXT, "-p", "8,16", "-n", 4, "--depth", "0,20", "-r", 2, "--json", "--threads", 1).lines()
        self.assertEqual(machine["machine"]["threads"], 1)
        self.assertGreater(machine["machine"]["read_gb_per_second"], 0)
        self.assertGreater(machine["first_token_seconds"], machine["load_seconds"])
        self.assertEqual([(t["test"], t["tokens"], t["depth"]) for t in tests],
                         [("prefill", 8, 0), ("prefill", 16, 0), ("decode", 4, 0), ("prefill", 8, 20), ("prefill", 16, 20), ("decode", 4, 20)])
        for t in tests:
            self.assertEqual(len(t["rounds"]), 2)
            self.assertAlmostEqual(t["tokens_per_second"], t["tokens"] / t["seconds"], delta=1e-6 * t["tokens_per_second"])

    def test_work_grows_with_tokens(self):
        # Nothing of a prompt is found in a cache: 16 times the tokens take several times as long.
        _, short, long = self.bench(*TEXT, "-p", "64,1024", "-n", 0, "-r", 5, "--json", "--threads", 1).lines()
        self.assertGreater(long["seconds"], 3 * short["seconds"])

    def test_batches_count_all_tokens(self):
        _, test = self.bench(*TEXT, "--batch", 3, "-n", 4, "-r", 1, "--json").lines()
        self.assertEqual((test["tokens"], test["batch"]), (12, 3))
        _, test = self.bench(*TEXT, "--lengths", "5,9", "-n", 4, "-r", 1, "--json").lines()
        self.assertEqual((test["tokens"], test["batch"], test["depth"]), (8, 2, 9))

    def test_rounds_wait_for_lines(self):
        machine, first, second = self.bench(*TEXT, "-p", 8, "-n", 4, "--interactive", stdin="\nprefill\n").lines()
        self.assertIn("load_seconds", machine)
        self.assertEqual([t["test"] for t in first["results"]], ["prefill", "decode"])
        self.assertEqual([t["test"] for t in second["results"]], ["prefill"])
        self.assertGreater(second["peak_memory_bytes"], 0)

    def test_dumps_can_be_compared(self):
        self.write(*TEXT)
        results = {}
        for precision in ("f32", "bf16", "q8"):
            path = self.directory / f"{precision}.safetensors"
            self.bench("--model", self.directory, "--precision", precision, "-p", 8, "-n", 0, "-r", 1, "--dump", path)
            results[precision] = read_safetensors(path)
            self.assertEqual(results[precision]["logits"][1], [8, 100])
        self.assertEqual(results["f32"]["input_ids"], results["q8"]["input_ids"])
        for precision in ("bf16", "q8"):
            difference = relative_difference(results[precision]["logits"][2], results["f32"]["logits"][2])
            self.assertTrue(0 < difference < 0.1, (precision, difference))

    def test_a_model_is_not_in_memory_twice_while_it_is_loaded(self):
        random = ("--random", "llama-1.1b", "--hidden", 512, "--intermediate", 1408, "--layers", 16, "--heads", 8, "--kv-heads", 8, "--vocabulary", 1000)
        self.bench(*random, "--write-checkpoint", self.directory)
        stored = (self.directory / "model.safetensors").stat().st_size
        machine, *_ = self.bench("--model", self.directory, "-p", 1, "-n", 0, "-r", 1, "--json").lines()
        self.assertLess(machine["peak_memory_bytes"], 1.4 * stored)
        self.assertGreater(machine["peak_memory_bytes"], 0.9 * stored)

    def test_encoder(self):
        path = self.directory / "features.safetensors"
        _, test = self.bench(*VISION, "-r", 1, "--json", "--dump", path).lines()
        self.assertEqual((test["test"], test["tokens"]), ("clip", 576))
        tensors = read_safetensors(path)
        self.assertEqual((tensors["pixels"][1], tensors["features"][1]), ([3, 336, 336], [576, 32]))

    def test_levels_are_capped(self):
        machine, *_ = self.bench(*TEXT, "-p", 8, "-n", 0, "-r", 1, "--json", "--isa", "baseline").lines()
        self.assertEqual(machine["machine"]["level"], "baseline")

    def test_wrong_usage(self):
        for status, piece, arguments in ((2, "--model", ()), (2, "--random", ("--write-checkpoint", self.directory)),
                                         (2, "--heads", (*TEXT, "--heads", 5)), (1, "no-such", (*TEXT, "--isa", "no-such")),
                                         (1, "no-such", ("--model", self.directory / "no-such"))):
            result = run("m2lm-bench", *arguments)
            self.assertEqual((result.status, result.out), (status, ""), result.err)
            self.assertIn(piece, result.err)


if __name__ == "__main__":
    main()

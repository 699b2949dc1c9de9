#!/usr/bin/env python3
"""m2lm-inspect: what it says of checkpoints in every container and layout, and of what is missing in broken ones."""

import json
import pathlib
import shutil
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "support"))
from runner import ASSETS, ROOT, TINY, main, need, run  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"


class Inspect(unittest.TestCase):
    def facts(self, *arguments, status=0):
        result = run("m2lm-inspect", *arguments, "--json")
        self.assertEqual(result.status, status, result.err + result.out)
        return result.lines()[0]

    def copy(self, source):
        directory = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, directory)
        return pathlib.Path(shutil.copytree(source, directory / "copy"))

    def test_llava_in_safetensors(self):
        f = self.facts(TINY)
        self.assertEqual((f["model_type"], f["architecture"], f["layout"]), ("llava", "LlavaForConditionalGeneration", "Hugging Face"))
        self.assertIn('Modality<"image", m2lm::ClipVit<>, m2lm::MlpProjector<2>>', f["loaded_by"])
        self.assertEqual((f["missing"], f["misshaped"], f["unexpected"], f["problems"]), ([], [], [], []))
        self.assertEqual((f["tokenizer"], f["tokens"], f["chat_template"]), ("tokenizer.model", 342, "user_assistant"))
        # The sizes, counted here from the file's own header.
        header = (TINY / "model.safetensors").read_bytes()
        header = json.loads(header[8:8 + int.from_bytes(header[:8], "little")])
        header.pop("__metadata__", None)
        self.assertEqual({t["name"]: (t["dtype"], t["shape"]) for t in f["tensors"]}, {n: ("f32", t["shape"]) for n, t in header.items()})
        ignored = ("encoder.layers.2.", "post_layernorm")  # behind the chosen layer
        matrices = vectors = 0
        for name, t in header.items():
            if any(part in name for part in ignored):
                continue
            size = 1
            for extent in t["shape"]:
                size *= extent
            if len(t["shape"]) > 1:
                matrices += size
            else:
                vectors += size
        self.assertEqual(f["parameters"], matrices + vectors)
        self.assertEqual(f["memory"]["f32"], 4 * (matrices + vectors))
        self.assertEqual(f["memory"]["bf16"], 2 * matrices + 4 * vectors)
        self.assertEqual(f["memory"]["4-bit"], int(matrices * 4.5 / 8 + 4 * vectors))

    def test_text(self):
        result = run("m2lm-inspect", GOLDEN / "llama/gqa_linear_tied_sharded")
        self.assertEqual((result.status, result.err), (0, ""))
        self.assertIn("llama: 2 layers, hidden 36, heads 6/2 of 6, vocabulary 96, context 128\n", result.out)
        self.assertIn("20 in 3 files", result.out)
        self.assertIn("\nmodel.layers.1.mlp.down_proj.weight f32 [36, 56]\n", result.out)
        summary = run("m2lm-inspect", GOLDEN / "llama/gqa_linear_tied_sharded", "--summary").out
        self.assertTrue(result.out.startswith(summary))
        self.assertNotIn("down_proj", summary)

    def test_pickled_shards_are_the_same_as_safetensors(self):
        ours, theirs = self.facts(GOLDEN / "pytorch/shards"), self.facts(GOLDEN / "llama/gqa_llama3_tied_f16")
        self.assertTrue(all(t["file"].endswith(".bin") for t in ours["tensors"]))
        listed = lambda f: sorted((t["name"], t["dtype"], t["shape"]) for t in f["tensors"])
        self.assertEqual(listed(ours), listed(theirs))
        self.assertEqual(ours["memory"], theirs["memory"])

    def test_native_layout(self):
        f = self.facts(GOLDEN / "native/inside")
        self.assertEqual((f["layout"], f["chat_template"], f["missing"], f["unexpected"]), ("LLaVA's own", "vicuna_v1", [], []))
        f = self.facts(GOLDEN / "native/apart", "--vision-tower", GOLDEN / "native/towers")
        self.assertIn("m2lm::MlpProjector<1>", f["loaded_by"])
        self.assertEqual((f["missing"], f["unexpected"]), ([], []))
        f = self.facts(GOLDEN / "native/apart", status=1)
        self.assertEqual(len(f["problems"]), 1)
        self.assertIn('mm_vision_tower is "openai/clip-vit-tiny-patch14"', f["problems"][0])

    def test_gguf(self):
        need(ASSETS / "llama/stories15M-Q4_0.gguf")
        f = self.facts(ASSETS / "llama/stories15M-Q4_0.gguf")
        self.assertEqual((f["layout"], f["tokenizer"], f["tokens"], f["missing"], f["unexpected"]), ("GGUF", "tokenizer.ggml", 32000, [], []))
        self.assertIn({"name": "model.layers.0.mlp.down_proj.weight", "dtype": "Q4_0", "shape": [288, 768], "bytes": 288 * 768 // 32 * 18,
                       "file": str(ASSETS / "llama/stories15M-Q4_0.gguf")}, f["tensors"])

    def test_an_encoder_alone(self):
        f = self.facts(GOLDEN / "clip/patch14_proj")
        self.assertEqual((f["loaded_by"], f["missing"], f["problems"]), ("m2lm::ClipVit<>, an encoder alone", [], []))

    def test_what_is_missing(self):
        copy = self.copy(GOLDEN / "llama/mha_plain")
        text = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(text.replace(b"model.norm.weight", b"model.morn.weight"))
        config = json.loads((copy / "config.json").read_text())
        config["intermediate_size"] += 1
        (copy / "config.json").write_text(json.dumps(config))
        f = self.facts(copy, status=1)
        self.assertEqual(f["missing"], ["model.norm.weight is missing; the nearest name is model.morn.weight"])
        self.assertEqual(len(f["unexpected"]), 1)
        self.assertEqual(len(f["misshaped"]), 9)
        config["model_type"] = "gpt_neox"
        (copy / "config.json").write_text(json.dumps(config))
        f = self.facts(copy, status=1)
        self.assertEqual(f["loaded_by"], "")
        self.assertIn('no model of the library loads model_type "gpt_neox"', f["problems"][0])
        (copy / "config.json").unlink()
        f = self.facts(copy, status=1)
        self.assertEqual(len(f["tensors"]), 30)
        self.assertIn("config.json: cannot open the file", f["problems"][0])

    def test_a_pickle_that_would_run_something(self):
        copy = self.copy(GOLDEN / "llama/mha_plain")
        (copy / "model.safetensors").unlink()
        shutil.copyfile(GOLDEN / "pytorch/whole_module.bin", copy / "pytorch_model.bin")
        f = self.facts(copy, status=1)
        self.assertTrue(any("nothing was run" in p for p in f["problems"]), f["problems"])

    def test_the_command_line(self):
        result = run("m2lm-inspect", "nowhere")
        self.assertEqual((result.status, result.out), (1, ""))
        self.assertIn("m2lm-inspect: there is no directory nowhere", result.err)
        self.assertEqual(run("m2lm-inspect").status, 2)
        result = run("m2lm-inspect", "--help")
        self.assertEqual((result.status, result.err), (0, ""))
        for option in ("--json", "--summary", "--vision-tower", "DIR"):
            self.assertIn(option, result.out)


if __name__ == "__main__":
    main()

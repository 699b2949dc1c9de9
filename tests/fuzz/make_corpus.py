"""Writes corpus/TARGET/ from the recorded results in tests/golden: a few small files for each fuzz target.

usage: python3 tests/fuzz/make_corpus.py        writes the same bytes each time; regression/ is kept by hand and not touched
"""
import json
import pathlib
import shutil
import struct

HERE = pathlib.Path(__file__).resolve().parent
GOLDEN = HERE.parent / "golden"
CORPUS = HERE / "corpus"


def safetensors(header, data=b""):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensors(*descriptions):
    header, offset = {}, 0
    for name, dtype, shape, size in descriptions:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    return safetensors(header, bytes(range(256))[:offset])


def ppm(kind, width, height, largest, data):
    return f"{kind}\n# comment\n{width} {height}\n{largest}\n".encode() + data


def bmp(width, height, bits, palette=b""):
    row = (width * bits + 31) // 32 * 4
    data = bytes(i * 7 % 256 for i in range(row * height))
    begin = 54 + len(palette)
    return (b"BM" + struct.pack("<IHHI", begin + len(data), 0, 0, begin) +
            struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, len(data), 2835, 2835, len(palette) // 4, 0) + palette + data)


GGUF_VALUES = {"u8": (0, "<B"), "i8": (1, "<b"), "u16": (2, "<H"), "i16": (3, "<h"), "u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"),
               "bool": (7, "<B"), "u64": (10, "<Q"), "i64": (11, "<q"), "f64": (12, "<d")}


def gguf_text(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_value(kind, value):
    """The number of the type and the bytes of the value."""
    if kind == "text":
        return 8, gguf_text(value)
    if kind == "list":
        element, values = value
        parts = [gguf_value(element, v) for v in values]
        return 9, struct.pack("<IQ", gguf_value(element, [] if element == "list" else "" if element == "text" else 0)[0] if not parts else parts[0][0],
                              len(parts)) + b"".join(p[1] for p in parts)
    number, code = GGUF_VALUES[kind]
    return number, struct.pack(code, value)


def gguf(keys, tensors, version=3):
    """keys: name -> (kind, value); tensors: name -> (extents, fastest first, type, bytes)."""
    out, data = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)), b""
    for name, (kind, value) in keys.items():
        number, stored = gguf_value(kind, value)
        out += gguf_text(name) + struct.pack("<I", number) + stored
    for name, (extents, kind, size) in tensors.items():
        out += gguf_text(name) + struct.pack("<I", len(extents)) + struct.pack(f"<{len(extents)}Q", *extents) + struct.pack("<IQ", kind, len(data))
        data += bytes(i * 5 % 256 for i in range(size)) + bytes(-size % 32)
    return out + bytes(-len(out) % 32) + data


def gguf_model():
    keys = {"general.architecture": ("text", "llama"), "llama.context_length": ("u32", 16), "llama.embedding_length": ("u32", 4),
            "llama.block_count": ("u32", 1), "llama.feed_forward_length": ("u32", 4), "llama.attention.head_count": ("u32", 2),
            "llama.attention.head_count_kv": ("u32", 1), "llama.rope.dimension_count": ("u32", 2), "llama.rope.freq_base": ("f32", 10000.0),
            "llama.attention.layer_norm_rms_epsilon": ("f32", 1e-5)}
    shapes = {"token_embd.weight": (4, 8), "output_norm.weight": (4,), "blk.0.attn_norm.weight": (4,), "blk.0.ffn_norm.weight": (4,),
              "blk.0.attn_q.weight": (4, 4), "blk.0.attn_k.weight": (4, 2), "blk.0.attn_v.weight": (4, 2), "blk.0.attn_output.weight": (4, 4),
              "blk.0.ffn_gate.weight": (4, 4), "blk.0.ffn_up.weight": (4, 4), "blk.0.ffn_down.weight": (4, 4), "rope_freqs.weight": (1,)}
    tensors = {}
    for name, shape in shapes.items():
        size = 4
        for extent in shape:
            size *= extent
        tensors[name] = (shape, 0, size)
    return keys, tensors


def gguf_seeds():
    keys, tensors = gguf_model()
    pieces = ["<unk>", "<s>", "</s>", "<0x61>", "\u2581", "a", "b", "\u2581a", "ab", "<image>"]
    spm = {"tokenizer.ggml.model": ("text", "llama"), "tokenizer.ggml.tokens": ("list", ("text", pieces)),
           "tokenizer.ggml.scores": ("list", ("f32", [-float(i) for i in range(len(pieces))])),
           "tokenizer.ggml.token_type": ("list", ("i32", [2, 3, 3, 6, 1, 1, 1, 1, 1, 4])), "tokenizer.ggml.bos_token_id": ("u32", 1),
           "tokenizer.ggml.eos_token_id": ("u32", 2), "tokenizer.ggml.unknown_token_id": ("u32", 0), "tokenizer.ggml.padding_token_id": ("u32", 0xffffffff),
           "tokenizer.chat_template": ("text", "{{ 'USER: ' }}")}
    characters = [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174 else None for b in range(256)]
    rest = iter(range(256, 512))
    characters = [c or chr(next(rest)) for c in characters]
    words = characters + ["ab", "abc", "<|eot_id|>", "<|begin|>"]
    bpe = {"tokenizer.ggml.model": ("text", "gpt2"), "tokenizer.ggml.pre": ("text", "llama-bpe"), "tokenizer.ggml.tokens": ("list", ("text", words)),
           "tokenizer.ggml.token_type": ("list", ("i32", [1] * 258 + [3, 3])), "tokenizer.ggml.merges": ("list", ("text", ["a b", "ab c"])),
           "tokenizer.ggml.bos_token_id": ("u32", 259), "tokenizer.ggml.eos_token_id": ("u32", 258)}
    clip = {"general.architecture": ("text", "clip"), "clip.projector_type": ("text", "mlp"), "clip.vision.image_size": ("u32", 4),
            "clip.vision.patch_size": ("u32", 2), "clip.vision.embedding_length": ("u32", 4), "clip.vision.feed_forward_length": ("u32", 8),
            "clip.vision.block_count": ("u32", 1), "clip.vision.attention.head_count": ("u32", 2), "clip.vision.projection_dim": ("u32", 4),
            "clip.vision.attention.layer_norm_epsilon": ("f32", 1e-5), "clip.vision.feature_layer": ("list", ("i32", [1])),
            "clip.vision.image_mean": ("list", ("f32", [0.5, 0.5, 0.5])), "clip.vision.image_std": ("list", ("f32", [0.5, 0.25, 0.5])), "clip.use_gelu": ("bool", 1)}
    eyes = {"v.class_embd": ((4,), 0, 16), "v.patch_embd.weight": ((2, 2, 3, 4), 1, 96), "v.blk.0.ffn_down.weight": ((4, 8), 0, 128),
            "mm.0.weight": ((4, 4), 0, 64), "mm.0.bias": ((4,), 0, 16), "mm.2.weight": ((4, 4), 30, 32)}
    quantised = {2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 10: 84, 11: 110, 12: 144, 13: 176, 14: 210}
    blocks = {f"q{kind}": ((32 if kind < 10 else 256, 2), kind, 2 * size) for kind, size in quantised.items()}
    values = {f"v.{kind}": (kind, 1) for kind in GGUF_VALUES} | {"v.list": ("list", ("list", [("u8", [1, 2]), ("text", ["x"])])), "general.alignment": ("u32", 32)}
    return {"empty": gguf({}, {}), "values": gguf(values, {}, 2), "blocks": gguf({}, blocks), "model": gguf(keys | spm, tensors),
            "bpe": gguf(bpe, {}), "clip": gguf(clip, eyes), "linear": gguf(keys | {"llama.rope.scaling.type": ("text", "linear"),
                                                                                  "llama.rope.scaling.factor": ("f32", 4.0)}, {"token_embd.weight": ((4, 8), 1, 64)})}


def bpe(name, merges):
    """tokenizer.json of tests/golden/bpe/NAME, cut to its bytes, its first merges and its added tokens."""
    data = json.loads((GOLDEN / "bpe" / name / "tokenizer.json").read_text())
    model = data["model"]
    model["merges"] = model["merges"][:merges]
    keep = {token for token in model["vocab"] if len(token) == 1} | {"".join(m if isinstance(m, list) else m.split(" ")) for m in model["merges"]}
    model["vocab"] = {token: i for token, i in model["vocab"].items() if token in keep}
    return json.dumps(data, separators=(",", ":")).encode()


GIF = bytes.fromhex("47494638396103000200800100ff0000ffffff21f90401000001002c00000000030002000002038c8f0500003b")

corpus = {
    "safetensors": {
        "empty": safetensors({}),
        "two": tensors(("a", "F32", [2, 3], 24), ("b", "BF16", [4], 8)),
        "scalar": tensors(("s", "I64", [], 8)),
        "zero": tensors(("none", "F32", [0, 5], 0), ("u", "U8", [3], 3)),
        "unknown": tensors(("q", "F8_E4M3", [2], 2)),
        "metadata": safetensors({"__metadata__": {"format": "pt"}, "x": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}, b"ab"),
    },
    "gguf": gguf_seeds(),
    "config": {
        path.parent.name: path.read_bytes()
        for path in sorted(GOLDEN.glob("*/*/config.json"))
    },
    "image": {
        path.name: path.read_bytes()
        for path in sorted((GOLDEN / "images").glob("*"))
        if path.suffix in (".png", ".jpg") and path.stat().st_size < 2500
    } | {
        "grey.pgm": ppm("P5", 3, 2, 255, bytes(6)),
        "colour16.ppm": ppm("P6", 2, 2, 65535, bytes(range(24))),
        "plain24.bmp": bmp(5, 3, 24),
        "palette8.bmp": bmp(5, 3, 8, bytes(i % 256 for i in range(1024))),
        "small.gif": GIF,
    },
    "npy": {path.name: path.read_bytes() for path in sorted((GOLDEN / "numpy").iterdir())},
    "pytorch": {
        path.name: path.read_bytes()
        for path in sorted((GOLDEN / "pytorch").glob("*.bin"))
    },
    "tokenizer": {
        f"text{i}": bytes([len(text)]) + text + (GOLDEN / "llava/with_tokenizer/tokenizer.model").read_bytes()
        for i, text in enumerate([b"What is in the picture?", "\u2581 \u00e9\u4e2d\U0001f600 <s>\n".encode()])
    },
    "tokenizer_json": {
        f"{name}{i}": bytes([len(text)]) + text + bpe(name, 12)
        for i, (name, text) in enumerate([("llama3", b"Hello, world! It's 1234"), ("qwen2", "e\u0301 \u4e2d <image> caf\u00e9\n".encode()), ("gpt2", b"they'll go  on")])
    },
    "chat_template": {},
    "placeholders": {
        "one": bytes([0, 1, 0x07, 1, 5]) + bytes([0x01, 0x07, 0x02]),
        "expanded": bytes([1, 1, 0x07, 2, 3, 4]) + bytes([0x01, 0x17, 0x02, 0x1f]),
        "two_kinds": bytes([0, 2, 0x06, 1, 9, 0x07, 2, 3, 1]) + bytes([0x07, 0x06, 0x07, 0x01]),
    },
}

conversations = ["\x01Hello", "\x01Hello\0\x02Hi.\0\x01And <image>?", "\0Be brief.\0\x01Hello", "\x01 \n\0\x02</s>\0\x01x"]
templates = ["", "{% if messages[0]['role'] == 'system' %}[INST] <<SYS>>", "{{ 'USER: ' + message['content'] + ' ASSISTANT:' }}"]
for i, conversation in enumerate(conversations):
    facts = ["llava", "llama", "LlavaForConditionalGeneration", "llava-v1.5-7b", templates[i % len(templates)]]
    corpus["chat_template"][f"conversation{i}"] = ("\x01" + "\0".join(facts) + "\0" + conversation).encode()

total = 0
for target, files in corpus.items():
    directory = CORPUS / target
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
        total += len(content)
print(f"{total} bytes in {sum(map(len, corpus.values()))} files")

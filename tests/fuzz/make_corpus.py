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
    "pytorch": {
        path.name: path.read_bytes()
        for path in sorted((GOLDEN / "pytorch").glob("*.bin"))
    },
    "tokenizer": {
        f"text{i}": bytes([len(text)]) + text + (GOLDEN / "llava/with_tokenizer/tokenizer.model").read_bytes()
        for i, text in enumerate([b"What is in the picture?", "\u2581 \u00e9\u4e2d\U0001f600 <s>\n".encode()])
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

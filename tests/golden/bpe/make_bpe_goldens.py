#!/usr/bin/env python3
"""Writes gpt2/, llama3/ and qwen2/ (tokenizer.json, cases.json) beside this file.

    python make_bpe_goldens.py        # tokenizers 0.23.3, transformers 5.23.0

Three byte-level BPEs of about 600 tokens, trained on the strings below. `cases`: text
and ids with special tokens; `decode`: ids and text; `fuzz`: for every 100 strings of fuzz_text() one FNV-1a hash of their ids.
"""

import json
import pathlib

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).resolve().parent
HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PROSE = """Writes llama3/ and qwen2/ (tokenizer.json, cases.json) beside this file.

    python make_bpe_goldens.py        # tokenizers 0.23.3, transformers 5.23.0

Two byte-level BPEs of about 600 tokens, trained on the strings below. `cases`: text
and ids with special tokens; `decode`: ids and text; `fuzz`: for every 100 strings of fuzz_text() one FNV-1a hash of their ids.
"""  # of the first version of this file: changing it changes the vocabularies
SENTENCES = [
    "Hello, world! It's 2024; they'RE here and WE'LL go.", "  leading and trailing   ", "a\n\n\nb \r\n c\t\td", "don'\u017f I'Ms 'S 'Ll x'd'", "12345678 1,234.5 \u0664\u0665\u0666 \u00bd\u2167",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u041a\u0430\u043a \u0434\u0435\u043b\u0430?", "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u4eca\u5929\u5929\u6c14\u5f88\u597d", "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c\u30ab\u30bf\u30ab\u30ca", "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4", "\u1112\u1161\u11ab\u1100\u116e\u11a8 e\u0301 a\u0323\u0302 o\u0302\u0323",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u0650\u0651\u064e", "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd", "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0958 \u0915\u093c", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01 \u0e33", "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u1f00\u0301", "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "x\u00a0y\u2003z\u3000w\u0085v\u2028u", "def f(x):\n    return x ** 2  # ok\n\n\n", "{\"key\": [1, 2, null]}\r\n", "https://example.org/a?b=c&d=%20", "", " ", "  ", "\n", " \n", "\n ", "\t", "...!!!\n\n  x", "\u212b \u2126 \ufb01 \u1e9b\u0323 \u0344 \u0f73",
    "caf\u00e9 cafe\u0301 na\u00efve", "a" * 300, "ab" * 100 + " " * 70 + "!" * 70, "\U00020000\U0001d54f\U0001f130 \U00011099\U000110ba", "\u0000\u0001\u007f\ufffd\uffff",
]
MARKS = ["<|begin|>", "<|end|>", " <|end|> ", "<image>", "  <image>  ", "<image><image>", "caf\u00e9", "<left> ", " <left>x", "<word>", " <word> ", "a<word>", "<word>\u0301", "\u4e16<word>", "<n\u00f6rm>", "<no\u0308rm>", "<|begin|", "<mark\u00e9>"]


def fuzz_text(number):
    """String `number`: code points of every script, drawn by a linear congruential generator."""
    state = (number * 0x9E3779B97F4A7C15 + 12345) % 2**64
    out = []

    def draw(n):
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (state >> 33) % n

    for _ in range(1 + draw(40)):
        kind = draw(12)
        if kind < 3:
            c = 0x20 + draw(0x5F)
        elif kind == 3:
            c = [9, 10, 13, 32, 32, 0xA0, 0x85, 0x2003, 0x3000, 0x27, 0x17F, 0x73][draw(12)]
        elif kind == 4:
            c = 0x27
            out.append(chr(c))
            c = ord("stmdrvlSTMDRVLe"[draw(15)])
        elif kind == 5:
            c = 0x300 + draw(0x70)
        elif kind == 6:
            c = 0xA0 + draw(0x560)
        elif kind == 7:
            c = 0x600 + draw(0x1C00)
        elif kind == 8:
            c = 0x1100 + draw(0x100) if draw(2) else 0xAC00 + draw(11172)
        elif kind == 9:
            c = 0x30 + draw(10)
        else:
            c = 1 + draw(0x10FFFF)
        if not 0xD800 <= c <= 0xDFFF:
            out.append(chr(c))
    return "".join(out)


def fuzz_hashes(tokenizer):
    hashes = []
    for block in range(100):
        value = 0xCBF29CE484222325
        for ids in tokenizer.encode_batch([fuzz_text(block * 100 + k) for k in range(100)], add_special_tokens=False):
            for i in [*ids.ids, 0x7FFFFFFF]:
                value = ((value ^ i) * 0x100000001B3) % 2**64
        hashes.append(f"{value:016x}")
    return hashes


def train(numbers, nfc):
    """`numbers` is None for GPT-2, whose regular expression lies in ByteLevel."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=numbers is not None and not nfc))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    if numbers is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        split = pre_tokenizers.Split(Regex(HEAD + numbers + TAIL), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    lines = SENTENCES * 3 + (PROSE + "\n").splitlines()
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|begin|>", "<|end|>")])
    tokenizer.add_tokens([
        AddedToken("<image>", lstrip=True, rstrip=True, normalized=False), AddedToken("<left>", lstrip=True, normalized=False),
        AddedToken("<word>", single_word=True, normalized=True), AddedToken("<n\u00f6rm>", normalized=True), AddedToken("<mark\u00e9>", normalized=False)])
    byte_level = processors.ByteLevel(trim_offsets=False)
    if nfc or numbers is None:
        tokenizer.post_processor = byte_level
    else:
        begin = tokenizer.token_to_id("<|begin|>")
        tokenizer.post_processor = processors.Sequence([byte_level, processors.TemplateProcessing(single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", begin)])])
    return tokenizer


def main():
    for name, numbers, nfc in (("gpt2", None, False), ("llama3", r"\p{N}{1,3}", False), ("qwen2", r"\p{N}", True)):
        tokenizer = train(numbers, nfc)
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=True, separators=(",", ":")) + "\n")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        texts = SENTENCES + MARKS + [a + m + b for a, m, b in zip(SENTENCES * 2, MARKS * 4, SENTENCES[7:] * 3)] + [fuzz_text(k) for k in range(30)]
        cases = []
        for text in texts:
            ids = tokenizer.encode(text).ids
            assert fast(text)["input_ids"] == ids, text
            cases.append({"text": text, "ids": ids})
        n, decode, state = tokenizer.get_vocab_size(), [], 1
        for k in range(60):
            ids = []
            for _ in range(1 + k % 9):
                state = (state * 1103515245 + 12345) % 2**31
                ids.append((state >> 8) % (256 if k % 2 else n))
            decode.append({"ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=False), "skipped": tokenizer.decode(ids, skip_special_tokens=True)})
        golden = {"vocab": n, "cases": cases, "decode": decode, "fuzz": fuzz_hashes(tokenizer)}
        with open(folder / "cases.json", "w") as file:
            json.dump(golden, file, separators=(",", ":"))
            file.write("\n")


if __name__ == "__main__":
    main()

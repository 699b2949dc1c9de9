#!/usr/bin/env python3
"""Writes include/m2lm/io/unicode_tables_impl.hpp.

    python make_unicode_tables.py ../../../include/m2lm/io/unicode_tables_impl.hpp

Letters, numbers and white space are what the regular expressions of the `tokenizers` package (Oniguruma) call \\p{L}, \\p{N} and
\\s, asked code point by code point, so that both sides cut the same pieces. Word characters are Python's unicodedata, and so are
combining classes and canonical decompositions, without the characters that the NFC of `tokenizers` (Unicode 9) does not know.
"""

import sys
import unicodedata

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

POINTS = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]


def matching(pattern):
    split = pre_tokenizers.Split(Regex(pattern + "+"), "removed", invert=True)
    out = set()
    for begin in range(0, len(POINTS), 4096):
        text = "".join(map(chr, POINTS[begin:begin + 4096]))
        for piece, _ in split.pre_tokenize_str(text):
            out.update(map(ord, piece))
    return out


def known_to_nfc(c):
    """Whether tokenizers' NFC treats c, and what c is made of, as Python does."""
    nfc = normalizers.NFC().normalize_str
    texts = [chr(c), unicodedata.normalize("NFD", chr(c))]
    for other in "\u0334\u0301\u0345\u05b0\u0323":
        texts += ["\u0378" + chr(c) + other, "\u0378" + other + chr(c)]
    return all(nfc(text) == unicodedata.normalize("NFC", text) for text in texts)


def ranges(points):
    out = []
    for c in sorted(points):
        if out and out[-1][1] == c - 1:
            out[-1][1] = c
        else:
            out.append([c, c])
    return out


def lines(items, width=128):
    line = " "
    for item in items:
        if len(line) + len(item) + 2 > width:
            yield line
            line = " "
        line += f" {item},"
    yield line


def table(name, comment, kind, items):
    items = list(items)
    return [f"/// {comment}", f"inline constexpr {kind} {name}[] = {{", *lines(items), "};", ""]


def range_table(name, comment, points):
    return table(name, comment, "UnicodeRange", (f"{{0x{a:x}, 0x{b:x}}}" for a, b in ranges(points)))


def main():
    letters, numbers, spaces = matching(r"\p{L}"), matching(r"\p{N}"), matching(r"\s")
    for c in POINTS:  # what Python knows, the regular expressions know alike
        category = unicodedata.category(chr(c))
        if category != "Cn" and (c in letters, c in numbers) != (category[0] == "L", category[0] == "N"):
            print(f"note: U+{c:04X} is {category} in Unicode {unicodedata.unidata_version}", file=sys.stderr)
    enclosed = {*range(0x24B6, 0x24EA), *range(0x1F130, 0x1F14A), *range(0x1F150, 0x1F16A), *range(0x1F170, 0x1F18A)}
    word = {c for c in POINTS if unicodedata.category(chr(c)) in {"Mn", "Mc", "Me", "Nd", "Nl", "Pc"}} | letters | enclosed | {0x200C, 0x200D}
    classes = []
    for c in POINTS:
        ccc = unicodedata.combining(chr(c))
        if ccc and not known_to_nfc(c):
            ccc = 0
        if ccc and classes and classes[-1][1] == c - 1 and classes[-1][2] == ccc:
            classes[-1][1] = c
        elif ccc:
            classes.append([c, c, ccc])
    decompositions, composes = [], []
    for c in POINTS:
        parts = unicodedata.decomposition(chr(c)).split()
        if not parts or parts[0].startswith("<") or not known_to_nfc(c):
            continue
        first, second = int(parts[0], 16), int(parts[1], 16) if len(parts) > 1 else 0
        composed = second and unicodedata.normalize("NFC", chr(c)) == chr(c)
        decompositions.append(f"{{0x{c:x}, 0x{first:x}, 0x{second:x}, {'true' if composed else 'false'}}}")
    out = [
        "// Code point tables of the pre-tokenisers and of NFC. Written by tests/golden/bpe/make_unicode_tables.py.",
        "// Floor: io. May include: core, interop.",
        "#pragma once",
        "",
        f"// Letters, numbers, white space: the regular expressions of tokenizers {tokenizers.__version__}. Words: Unicode {unicodedata.unidata_version}. NFC: Unicode 9, as there.",
        "#include <cstdint>",
        "",
        "#include <m2lm/config.hpp>",
        "",
        "namespace m2lm::inline M2LM_ABI::detail {",
        "",
        "/// Code points first … last.",
        "struct UnicodeRange {",
        "  std::uint32_t first, last;",
        "};",
        "struct CombiningRange {",
        "  std::uint32_t first, last;",
        "  std::uint8_t combining_class;",
        "};",
        "/// A canonical decomposition; `second` is 0 where one code point replaces another. `composes`: NFC puts it together again.",
        "struct Decomposition {",
        "  std::uint32_t whole, first, second;",
        "  bool composes;",
        "};",
        "",
        "// clang-format off",
        *range_table("unicode_letters", r"\p{L}", letters),
        *range_table("unicode_numbers", r"\p{N}", numbers),
        *range_table("unicode_spaces", r"\s", spaces),
        *range_table("unicode_word", r"\w", word),
        *table("unicode_combining", "Code points whose canonical combining class is not 0.", "CombiningRange",
               (f"{{0x{a:x}, 0x{b:x}, {k}}}" for a, b, k in classes)),
        *table("unicode_decompositions", "In order of `whole`; Hangul syllables are computed.", "Decomposition", decompositions),
        "// clang-format on",
        "",
        "}  // namespace m2lm::detail",
    ]
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        file.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()

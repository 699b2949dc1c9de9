// zip, pickle and pytorch_model.bin: what PyTorch wrote is read exactly, and nothing hostile gets further than an error.
#include <m2lm/m2lm.hpp>

#include <doctest/doctest.h>

#include <support.hpp>
#include <support/torch_file.hpp>

#include <algorithm>
#include <cstring>

using m2lm::AnyTensor;
using m2lm::Checkpoint;
using m2lm::CheckpointError;
using m2lm::PytorchFile;
using m2lm::Safetensors;
using m2lm::ZipArchive;
using m2lm_test::golden;
using m2lm_test::has;
using m2lm_test::message_of;
using m2lm_test::PickleText;
using m2lm_test::torch_file;
using m2lm_test::zip_archive;
using m2lm_test::zip_member;
using m2lm_test::ZipMember;

namespace {

void check_same(const std::string& file, const std::string& recorded) {
  const PytorchFile ours = PytorchFile::open(golden("pytorch/" + file));
  const Safetensors theirs = Safetensors::open(golden("pytorch/" + recorded));
  CHECK(ours.names().size() == theirs.names().size());
  for (const std::string& name : theirs.names()) {
    INFO(name);
    REQUIRE(ours.contains(name));
    const AnyTensor &a = ours.tensor(name), b = theirs.tensor(name);
    CHECK(a.dtype() == b.dtype());
    CHECK(a.shape() == b.shape());
    CHECK(std::memcmp(a.data(), b.data(), b.bytes()) == 0);
  }
}

/// The message about a file of the given bytes; empty when it is accepted.
std::string refusal(const std::string& bytes) {
  const m2lm_test::TemporaryDirectory dir;
  const std::string path = dir.write("x.bin", bytes);
  const std::string message = message_of<CheckpointError>([&] { (void)PytorchFile::open(path); });
  CHECK((message.empty() || has(message, "x.bin: ")));
  return message;
}

std::string floats(std::size_t n) {
  std::string out;
  for (std::size_t i = 0; i < n; ++i) out += m2lm_test::little_endian(static_cast<float>(i));
  return out;
}

/// {"w": tensor} as a file with one storage of `stored` floats.
std::string one_tensor(std::size_t stored, std::int64_t elements, std::int64_t offset, const std::vector<std::int64_t>& shape,
                       const std::vector<std::int64_t>& strides) {
  PickleText p;
  p.raw("}").string("w").tensor("FloatStorage", "0", elements, offset, shape, strides).raw("s.");
  return torch_file(p.text(), {floats(stored)});
}

}  // namespace

TEST_CASE("what torch.save wrote: strides, offsets, shared storages, parameters, every dtype, three protocols") {
  check_same("layouts.bin", "layouts.safetensors");
  check_same("dtypes.bin", "dtypes.safetensors");
  check_same("dtypes_p2.bin", "dtypes.safetensors");
  check_same("module.bin", "module.safetensors");
  const PytorchFile file = PytorchFile::open(golden("pytorch/layouts.bin"));
  CHECK(file.names().front() == "plain");
  CHECK(file.names().back() == "parameter");
  // A contiguous tensor is a view of the mapping; equal views in another order share one copy.
  const auto bytes = file.mapping().bytes();
  CHECK(file.tensor("plain").data() >= bytes.data());
  CHECK(file.tensor("plain").data() < bytes.data() + bytes.size());
  CHECK(file.tensor("tied").data() == file.tensor("transposed").data());
  CHECK(has(message_of<CheckpointError>([&] { (void)file.tensor("plane"); }), "has no tensor \"plane\"; the nearest name is plain"));
}

TEST_CASE("a sharded pytorch_model.bin is the same checkpoint as its safetensors") {
  const Checkpoint ours = Checkpoint::open(golden("pytorch/shards")), theirs = Checkpoint::open(golden("llama/gqa_llama3_tied_f16"));
  CHECK(ours.names().size() == theirs.names().size());
  for (const std::string& name : theirs.names()) {
    const AnyTensor *a = ours.find(name), *b = theirs.find(name);
    REQUIRE_MESSAGE(a != nullptr, name);
    CHECK(a->dtype() == b->dtype());
    CHECK(a->shape() == b->shape());
    CHECK(std::memcmp(a->data(), b->data(), b->bytes()) == 0);
    CHECK(has(std::string(ours.file_of(name)), "of-00002.bin"));
  }
}

TEST_CASE("what torch.save wrote, but is no state dict, is refused with a way out") {
  const auto message = [](const char* name) {
    return message_of<CheckpointError>([&] { (void)PytorchFile::open(golden(std::string("pytorch/") + name)); });
  };
  CHECK(has(message("bare_tensor.bin"), "holds something else than a state dict"));
  CHECK(has(message("whole_module.bin"), "asks for torch.nn.modules.container.Sequential, which no state dict needs; nothing was run"));
  CHECK(has(message("nested.bin"), "Save the state dict that it holds, alone"));
  CHECK(has(message("expanded.bin"), "tensor \"w\": shape [5] has more elements than its storage, 1"));
  CHECK(has(refusal(std::string("\x80\x02\x8a\x0a\x6c\xfc", 6)), "the format that PyTorch used before 1.6"));
  const std::string script = zip_archive({zip_member("m/data.pkl", PickleText().raw("}.").text()), zip_member("m/constants.pkl", "x")});
  CHECK(has(refusal(script), "TorchScript"));
  const std::string big = zip_archive({zip_member("m/data.pkl", PickleText().raw("}.").text()), zip_member("m/byteorder", "big")});
  CHECK(has(refusal(big), "another byte order"));
}

TEST_CASE("a pickle that would run something is refused, and nothing runs") {
  const m2lm_test::TemporaryDirectory dir;
  const std::string marker = dir / "ran", command = "touch " + marker;
  const auto refused = [&](const PickleText& p) {
    const std::string message = refusal(torch_file(p.text(), {floats(1)}));
    CHECK(!m2lm::file_exists(marker));
    return message;
  };
  CHECK(has(refused(PickleText().global("os", "system").raw("(").string(command).raw("tR.")),
            "asks for os.system, which no state dict needs; nothing was run"));
  CHECK(has(refused(PickleText().global("posix", "system").raw("(").string(command).raw("tR.")), "posix.system"));
  CHECK(has(refused(PickleText().global("builtins", "eval").raw("(").string("1").raw("tR.")), "builtins.eval"));
  CHECK(has(refused(PickleText().string("os").string("system").raw("\x93(").string(command).raw("tR.")), "asks for os.system"));
  CHECK(has(refused(PickleText().raw("(S'x'\nios\nsystem\n.")), "opcode 83 ('S')"));
  CHECK(has(refused(PickleText().raw("(").string(command).raw("ios\nsystem\n.")), "opcode 105 ('i')"));
  CHECK(has(refused(PickleText().raw("(cos\nsystem\n").string(command).raw("o.")), "asks for os.system"));
  CHECK(has(refused(PickleText().raw("}}\x81.")), "opcode 129"));
  // Names that are known, in the wrong place.
  CHECK(has(refused(PickleText().global("torch", "FloatStorage").raw(")R.")), "calls torch.FloatStorage, which is a name of a type only"));
  CHECK(has(refused(PickleText().global("collections", "OrderedDict").raw("}b.")), "sets the state of something else than a dict"));
  CHECK(has(refused(PickleText().global("collections", "OrderedDict").raw("(").integer(1).raw("tR.")), "an OrderedDict is made of 1 arguments"));
  CHECK(has(refused(PickleText().raw("}).R.")), "ends with 2 values"));
  CHECK(has(refused(PickleText().raw("})R.")), "calls what is no function"));
  CHECK(has(refused(PickleText().global("torch._utils", "_rebuild_parameter").raw("}NN\x87R.")),
            "a parameter is made of something else than a tensor"));
  CHECK(has(refused(PickleText().string("0").raw("Q.")), "a persistent id is no tuple"));
  CHECK(has(refused(PickleText().raw("\xff.")), "opcode 255 is not one that torch.save of a state dict uses"));
}

TEST_CASE("pickles that are damaged, hold themselves or nest deeply") {
  const auto refused = [](const PickleText& p) { return refusal(torch_file(p.text(), {})); };
  CHECK(has(refused(PickleText()), "ends without STOP: the file is truncated"));
  CHECK(has(refused(PickleText().raw("X\xff\xff\xff\xff")), "a text of 4294967295 bytes does not fit in the 0 that are left"));
  CHECK(has(refused(PickleText().raw("J\x01")), "ends in the middle of a number"));
  CHECK(has(refused(PickleText().raw("h\x05.")), "recalls value 5, which was not noted"));
  CHECK(has(refused(PickleText().raw("}q")), "ends in the middle of a number"));
  CHECK(has(refused(PickleText().raw("q")), "looks at an empty stack"));
  CHECK(has(refused(PickleText().raw("0.")), "takes a value from an empty stack"));
  CHECK(has(refused(PickleText().raw("t.")), "has no mark"));
  CHECK(has(refused(PickleText().raw("(.")), "ends with 0 values"));
  CHECK(has(refused(PickleText().raw("N(0.")), "takes a value from an empty stack"));  // not through a mark
  CHECK(has(refused(PickleText().raw("}(NNNu.")), "a key without a value"));
  CHECK(has(refused(PickleText().raw("cos")), "a line does not end"));
  CHECK(has(refused(PickleText().raw("\x8a\x09")), "an integer of 9 bytes"));
  CHECK(has(refused(PickleText().raw("\x80\x09")), "protocol 9 is not known"));
  CHECK(has(refused(PickleText().raw("}Ns.")), "looks at an empty stack"));
  CHECK(has(refused(PickleText().raw("NNNs.")), "puts a member into what is no dict"));
  CHECK(has(refused(PickleText().raw("}Na.")), "appends to what is no list"));
  CHECK(has(refused(PickleText().raw("}N").tensor("FloatStorage", "0", 0, 0, {0}, {1}).raw("s.")), "a tensor's name is no text"));
  // Values that hold themselves: allowed, and no trap.
  CHECK(has(refused(PickleText().raw("}q").raw(std::string_view("\0h\0h\0s.", 7))), "has no tensor among its 1 members, but dicts"));
  CHECK(refused(PickleText().raw("}N]q").raw(std::string_view("\0h\0as.", 6))).empty());
  // A million levels of nesting: one tuple in another.
  std::string deep(1'000'000, '\x85');
  CHECK(refused(PickleText().raw("}NN").raw(deep).raw("s.")).empty());
  CHECK(has(refused(PickleText().raw(std::string(1'000'000, '('))), "ends without STOP"));
  // A pickle at the limit, and one byte above it.
  const m2lm_test::TemporaryDirectory dir;
  const std::string pickle = PickleText().raw("}.").text(), path = dir.write("x.bin", torch_file(pickle, {}));
  CHECK(PytorchFile::open(path, {.max_pickle_bytes = pickle.size()}).names().empty());
  CHECK(has(message_of<CheckpointError>([&] { (void)PytorchFile::open(path, {.max_pickle_bytes = pickle.size() - 1}); }),
            "the pickle is 4 bytes long, more than the 3 allowed (PytorchLimits::max_pickle_bytes)"));
  CHECK(has(message_of<m2lm::OptionError>([&] { (void)PytorchFile::open(path, {.max_pickle_bytes = (std::size_t{1} << 31) + 1}); }),
            "is above 2147483648"));
}

TEST_CASE("tensors that do not lie inside their storage") {
  CHECK(refusal(one_tensor(6, 6, 0, {2, 3}, {3, 1})).empty());
  CHECK(refusal(one_tensor(6, 6, 5, {1, 1}, {99, 99})).empty());  // strides of single elements mean nothing
  CHECK(refusal(one_tensor(0, 0, 7, {3, 0}, {1, 1})).empty());
  CHECK(refusal(one_tensor(6, 6, 1, {5}, {1})).empty());
  CHECK(has(refusal(one_tensor(6, 6, 2, {5}, {1})),
            "tensor \"w\": shape [5] with strides [1] from element 2 on does not lie inside a storage of 6 elements"));
  CHECK(has(refusal(one_tensor(6, 6, 0, {2, 3}, {4, 1})), "does not lie inside"));
  CHECK(has(refusal(one_tensor(6, 6, -1, {2}, {1})), "its offset is -1"));
  CHECK(has(refusal(one_tensor(6, 6, 0, {2}, {-1})), "with strides [-1]"));
  CHECK(has(refusal(one_tensor(6, 6, 0, {-2}, {1})), "its shape is [-2]"));
  CHECK(has(refusal(one_tensor(6, 6, 0, {7}, {0})), "more elements than its storage"));
  CHECK(has(refusal(one_tensor(6, 6, 0, {std::int64_t{1} << 62, 4}, {0, 0})), "more elements than can be counted"));
  CHECK(has(refusal(one_tensor(6, 6, 0, {0, std::int64_t{1} << 62, 4}, {1, 1, 1})), ""));
  CHECK(has(refusal(one_tensor(6, 6, 0, {3, 2}, {std::int64_t{1} << 62, 1})), "does not lie inside"));
  CHECK(has(refusal(one_tensor(6, 6, INT64_MAX, {2}, {1})), "does not lie inside"));
  CHECK(has(refusal(one_tensor(5, 6, 0, {2}, {1})), "its storage is said to have 6 elements of f32, but takes 20 bytes"));
  CHECK(has(refusal(one_tensor(7, 6, 0, {2}, {1})), "but takes 28 bytes"));
  CHECK(has(refusal(one_tensor(6, -6, 0, {2}, {1})), "a storage of -6 elements"));
  CHECK(has(refusal(one_tensor(6, 6, 0, {2, 1}, {1})), "2 dimensions and 1 strides"));
  CHECK(has(refusal(one_tensor(6, 6, 0, {1, 1, 1, 1, 1, 1, 1}, {1, 1, 1, 1, 1, 1, 1})), "7 dimensions, at most 6"));
  PickleText missing;
  missing.raw("}").string("w").tensor("FloatStorage", "8", 1, 0, {1}, {1}).raw("s.");
  CHECK(has(refusal(torch_file(missing.text(), {floats(1)})), "its storage archive/data/8 is not in the file"));
  PickleText escape;
  escape.raw("}").string("w").tensor("FloatStorage", "../../etc/passwd", 1, 0, {1}, {1}).raw("s.");
  CHECK(has(refusal(torch_file(escape.text(), {floats(1)})), "archive/data/../../etc/passwd is not in the file"));
  PickleText twice;
  twice.raw("}").string("w").tensor("FloatStorage", "0", 1, 0, {1}, {1}).raw("s").string("w").tensor("FloatStorage", "0", 1, 0, {1}, {1}).raw("s.");
  CHECK(has(refusal(torch_file(twice.text(), {floats(1)})), "tensor \"w\": is there twice"));
}

TEST_CASE("copies into order take no more memory than the file has bytes") {
  // Every tensor asks for another order of one storage: 100 copies of 8000 bytes out of a file of about 30 KB.
  PickleText p;
  p.raw("}");
  for (int i = 0; i < 100; ++i) p.string("w" + std::to_string(i)).tensor("FloatStorage", "0", 2000, i % 2, {999, 2}, {1, 1000 - i}).raw("s");
  CHECK(has(refusal(torch_file(p.raw(".").text(), {floats(2000)})), "too many tensors lie in another order than their shape says"));
}

TEST_CASE("zip archives: both sizes of numbers, and everything that can be wrong") {
  const std::string pickle = PickleText().raw("}").string("w").tensor("FloatStorage", "0", 3, 0, {3}, {1}).raw("s.").text();
  for (const bool wide : {false, true}) {
    const std::string whole = torch_file(pickle, {floats(3)}, wide);
    CHECK(refusal(whole).empty());
    // Every shorter file is refused.
    for (std::size_t n = 0; n < whole.size(); n += n < 64 || n + 200 > whole.size() ? 1 : 7) CHECK(!refusal(whole.substr(0, n)).empty());
    CHECK(has(refusal(whole.substr(0, whole.size() - 1)), "no end of a zip archive is found: the file is truncated"));
  }
  const auto with = [&](auto&& change, bool wide = false, std::uint64_t count_error = 0, std::uint64_t directory_error = 0) {
    std::vector<ZipMember> members{zip_member("a/data.pkl", pickle), zip_member("a/data/0", floats(3))};
    change(members);
    return refusal(zip_archive(members, wide, count_error, directory_error));
  };
  const auto nothing = [](auto&) {};
  CHECK(with(nothing).empty());
  CHECK(has(with([](auto& m) { m[0].crc ^= 1; }), "entry \"a/data.pkl\": its checksum is"));
  CHECK(has(with([](auto& m) { m[1].method = 8; }), "entry \"a/data/0\": is compressed (method 8)"));
  CHECK(has(with([](auto& m) { m[1].flags = 1; }), "is encrypted"));
  for (const bool wide : {false, true}) {
    CHECK(has(with([](auto& m) { m[1].size_error = 1; }, wide), "do not fit before the directory"));
    CHECK(has(with([](auto& m) { m[0].size_error = 1; }, wide), "its checksum is"));  // one byte more is still before the next data
    CHECK(has(with([](auto& m) { m[0].size_error = 45; }, wide), "overlap"));
    CHECK(has(with([](auto& m) { m[1].offset_error = 1; }, wide), "nothing begins at byte"));
    CHECK(has(with([](auto& m) { m[1].offset_error = 1 << 20; }, wide), "where the directory is"));
    CHECK(has(with(nothing, wide, 1), wide ? "entry 2 of the zip directory is damaged" : "cannot hold 3 entries"));
    CHECK(has(with(nothing, wide, 5000), "cannot hold 5002 entries"));
    CHECK(has(with(nothing, wide, 0, 1), "the zip directory is said to be"));
    CHECK(has(with(nothing, wide, 0, static_cast<std::uint64_t>(-1)), "entry 0 of the zip directory is damaged"));
    CHECK(has(with(nothing, wide, 0, 1 << 20), "the zip directory is said to be"));
  }
  CHECK(has(with([](auto& m) { m[1].size_error = ~std::uint64_t{0} - 20; }, true), "do not fit"));
  CHECK(has(with([](auto& m) { m[1].offset_error = std::uint64_t{1} << 63; }, true), "where the directory is"));
  CHECK(has(with(nothing, true, ~std::uint64_t{0} - 5), "cannot hold"));
  CHECK(has(with(nothing, true, 0, std::uint64_t{1} << 63), "the zip directory is said to be"));
  CHECK(has(with(nothing, false, static_cast<std::uint64_t>(-1)), "bytes behind its last entry"));
  CHECK(has(with([](auto& m) { m.push_back(m[1]); }), "entry \"a/data/0\" is there twice"));
  CHECK(has(with([](auto& m) { m.erase(m.begin()); }), "none that torch.save made: it has no NAME/data.pkl"));
  CHECK(has(with([](auto& m) { m.push_back(zip_member("b/data.pkl", "x")); }), "holds two pickles, b/data.pkl and a/data.pkl"));
  CHECK(has(refusal(""), "no end of a zip archive"));
  CHECK(has(refusal("PK"), "no end of a zip archive"));
}

TEST_CASE("every changed byte of a file gives the same tensors, other values, or an error") {
  const std::string good =
      torch_file(PickleText().raw("}").string("w").tensor("FloatStorage", "0", 3, 0, {3}, {1}).raw("s.").text(), {floats(3)}, true);
  const m2lm_test::TemporaryDirectory dir;
  std::size_t accepted = 0;
  for (std::size_t i = 0; i < good.size(); ++i)
    for (const int change : {0x01, 0x80, 0xff}) {
      std::string bytes = good;
      bytes[i] = static_cast<char>(bytes[i] ^ change);
      const std::string path = dir.write("x.bin", bytes);
      try {
        const PytorchFile file = PytorchFile::open(path);
        for (const std::string& name : file.names())
          for (std::int64_t j = 0; j < file.tensor(name).shape().elements(); ++j) (void)file.tensor(name).at(j);
        ++accepted;
      } catch (const CheckpointError& error) {
        CHECK(has(error.what(), "x.bin: "));
      }
    }
  CHECK(accepted > 0);  // times and attributes mean nothing to us
}

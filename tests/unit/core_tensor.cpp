// Shape, View, Tensor, AnyTensor and the errors they throw.
#include <doctest/doctest.h>

#include <m2lm/core.hpp>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace m2lm;

TEST_CASE("Shape") {
  CHECK(Shape{}.rank() == 0);
  CHECK(Shape{}.elements() == 1);
  CHECK(Shape{}.string() == "[]");
  CHECK(Shape{2, 3, 4}.elements() == 24);
  CHECK(Shape{2, 0, 4}.elements() == 0);
  CHECK(Shape{2, 3, 4}.string() == "[2, 3, 4]");
  CHECK(Shape{2, 3} == Shape{2, 3});
  CHECK(Shape{2, 3} != Shape{3, 2});
  CHECK(Shape{2, 3} != Shape{2, 3, 1});
  CHECK_THROWS_WITH_AS((Shape{1, 1, 1, 1, 1, 1, 1}), "m2lm: a tensor has at most 6 dimensions", ShapeError);
}

TEST_CASE("View: indices, rows, columns and strides") {
  std::vector<int> data(24);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<int>(i);
  const View<int, 3> cube(data.data(), {2, 3, 4});
  CHECK(cube(1, 2, 3) == 23);
  CHECK(cube.shape() == Shape{2, 3, 4});
  CHECK(cube.elements() == 24);
  CHECK(cube.contiguous());
  CHECK(cube.rows(1, 2)(0, 0, 0) == 12);
  CHECK(cube.rows(1, 2).contiguous());
  CHECK(cube.rows(2, 2).elements() == 0);

  const Matrix<int> matrix(data.data(), {6, 4});
  const Matrix<int> middle = matrix.rows(1, 4).columns(1, 3);
  CHECK(middle.shape() == Shape{3, 2});
  CHECK(middle(0, 0) == 5);
  CHECK(middle(2, 1) == 14);
  CHECK(middle.row(2) == data.data() + 13);
  CHECK_FALSE(middle.contiguous());
  CHECK(matrix.rows(2, 3).columns(1, 3).contiguous());  // one row: the stride does not matter
  middle(1, 1) = -1;
  CHECK(data[10] == -1);

  const Matrix<const int> read_only = middle;
  CHECK(read_only(1, 1) == -1);
  CHECK(read_only.strides() == middle.strides());
  CHECK(Matrix<int>().elements() == 0);

  CHECK_THROWS_WITH_AS(matrix.rows(2, 7), "m2lm::View::rows(2, 7) of 6 rows", ShapeError);
  CHECK_THROWS_AS(matrix.rows(-1, 2), ShapeError);
  CHECK_THROWS_AS(matrix.rows(3, 2), ShapeError);
  CHECK_THROWS_WITH_AS(matrix.columns(0, 5), "m2lm::View::columns(0, 5) of 4", ShapeError);
}

TEST_CASE("Tensor: zeroed, aligned, movable, cloned on purpose") {
  Tensor<float> t(Shape{3, 5});
  CHECK(t.elements() == 15);
  CHECK(reinterpret_cast<std::uintptr_t>(t.data()) % 64 == 0);
  for (const float x : t.span()) CHECK(x == 0.0F);
  t.data()[7] = 4;
  Tensor<float> copy = t.clone();
  t.data()[7] = 5;
  CHECK(copy.view<2>()(1, 2) == 4.0F);
  const float* address = t.data();
  const Tensor<float> moved = std::move(t);
  CHECK(moved.data() == address);
  CHECK(moved.view<2>().shape() == Shape{3, 5});

  CHECK(Tensor<float>().empty());
  CHECK(Tensor<float>().elements() == 0);
  CHECK(Tensor<float>(Shape{0, 5}).empty());
  CHECK(Tensor<float>(Shape{0, 5}).clone().shape() == Shape{0, 5});
  CHECK(Tensor<double>(Shape{}).elements() == 1);
  CHECK_THROWS_WITH_AS(moved.view<3>(), "m2lm::Tensor::view: a view of rank 3 of a tensor of shape [3, 5]", ShapeError);
  static_assert(!std::is_copy_constructible_v<Tensor<float>> && !std::is_copy_assignable_v<Tensor<float>>);
}

template <class T>
AnyTensor of(std::vector<T> values) {
  Tensor<T> t(Shape{static_cast<std::int64_t>(values.size())});
  for (std::size_t i = 0; i < values.size(); ++i) t.data()[i] = values[i];
  return AnyTensor(std::move(t));
}

template <class T>
void check_conversion(const AnyTensor& tensor, const std::vector<double>& expected) {
  const Tensor<T> got = tensor.to<T>();
  CHECK(got.shape() == tensor.shape());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    CHECK(tensor.at(static_cast<std::int64_t>(i)) == expected[i]);
    CHECK(static_cast<double>(got.data()[i]) == expected[i]);
  }
  T tail[2]{};
  tensor.copy_to(tail, 1, 2);
  CHECK(static_cast<double>(tail[0]) == expected[1]);
  CHECK(static_cast<double>(tail[1]) == expected[2]);
}

TEST_CASE_TEMPLATE("AnyTensor converts every stored dtype", T, float, double) {
  check_conversion<T>(of<double>({1.5, -2.25, 1024}), {1.5, -2.25, 1024});
  check_conversion<T>(of<float>({1.5F, -2.25F, 1024}), {1.5, -2.25, 1024});
  check_conversion<T>(of<Half>({to_half(1.5F), to_half(-2.25F), to_half(1024)}), {1.5, -2.25, 1024});
  check_conversion<T>(of<Bf16>({to_bf16(1.5F), to_bf16(-2.25F), to_bf16(1024)}), {1.5, -2.25, 1024});
  check_conversion<T>(of<std::int64_t>({1, -2, 1 << 20}), {1, -2, 1 << 20});
  check_conversion<T>(of<std::int32_t>({1, -2, 1 << 20}), {1, -2, 1 << 20});
  check_conversion<T>(of<std::int16_t>({1, -2, 30000}), {1, -2, 30000});
  check_conversion<T>(of<std::int8_t>({1, -2, 127}), {1, -2, 127});
  check_conversion<T>(of<std::uint8_t>({1, 2, 255}), {1, 2, 255});
  check_conversion<T>(of<bool>({true, false, true}), {1, 0, 1});
}

TEST_CASE("AnyTensor: bytes at any address, with an owner") {
  // A mapped file gives no alignment.
  auto bytes = std::make_shared<std::vector<std::byte>>(17);
  const float values[] = {3, -4, 5, 6};
  std::memcpy(bytes->data() + 1, values, sizeof(values));
  const std::weak_ptr<void> watch = bytes;
  AnyTensor tensor(DType::f32, Shape{2, 2}, bytes->data() + 1, bytes);
  bytes.reset();
  CHECK_FALSE(watch.expired());
  CHECK(tensor.bytes() == 16);
  CHECK(tensor.at(1) == -4);
  CHECK(tensor.to<float>().data()[3] == 6.0F);
  const AnyTensor copy = tensor;
  tensor = AnyTensor();
  CHECK_FALSE(tensor.has_value());
  CHECK(copy.at(2) == 5);
  CHECK_FALSE(watch.expired());
}

TEST_CASE("AnyTensor: a dtype without elements is an error") {
  const std::byte b{};
  const AnyTensor tensor(DType::native, Shape{1}, &b, nullptr);
  CHECK_THROWS_WITH_AS(tensor.at(0), "m2lm::AnyTensor::at: elements of dtype native cannot be read", ShapeError);
}

TEST_CASE("errors: one base, a message of joined pieces") {
  CHECK(concat("rows ", 3, " of ", std::int64_t{4}, ' ', true, std::string(" x")) == "rows 3 of 4 true x");
  CHECK_NOTHROW(require(true, "not thrown"));
  CHECK_THROWS_WITH_AS(require(false, "a ", 1), "a 1", ShapeError);
  CHECK_THROWS_WITH_AS(require<InputError>(false, "b"), "b", InputError);
  for (const auto& throw_one : {+[] { throw ShapeError("x"); }, +[] { throw CheckpointError("x"); }, +[] { throw InputError("x"); },
                               +[] { throw OptionError("x"); }, +[] { throw CapacityError("x"); }}) {
    CHECK_THROWS_AS(throw_one(), Error);
    CHECK_THROWS_AS(throw_one(), std::runtime_error);
  }
}

// ---- fields ----------------------------------------------------------------------------------------------------------------

struct Projection {
  Parameter weight{Shape{4, 3}}, bias{Shape{4}};
  bool has_bias = true;
  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("weight", self.weight);
    if (self.has_bias) visit("bias", self.bias);
  }
};
struct Block {
  Projection q_proj, o_proj;
  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("q_proj", self.q_proj);
    visit("self_attn.o_proj", self.o_proj);
  }
};
struct Tower {
  Parameter embedding{Shape{10, 3}};
  std::vector<Block> layers = std::vector<Block>(2);
  Projection head;
  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("embed.weight", self.embedding);
    visit("layers", self.layers);
    visit("", self.head);
  }
};

TEST_CASE("fields: names, order, prefix and what is switched off") {
  static_assert(ParameterStruct<Tower> && ParameterStruct<const Block> && !ParameterStruct<Parameter> && !ParameterStruct<int>);
  Tower tower;
  tower.layers[1].o_proj.has_bias = false;
  std::vector<std::string> names;
  std::int64_t elements = 0;
  const auto visit = [&](std::string_view name, const Parameter& p) {
    names.emplace_back(name);
    elements += p.shape.elements();
    CHECK_FALSE(p.present());
  };
  for_each_parameter(visit, std::as_const(tower), "model");
  const std::vector<std::string> expected{
      "model.embed.weight",           "model.layers.0.q_proj.weight", "model.layers.0.q_proj.bias",   "model.layers.0.self_attn.o_proj.weight",
      "model.layers.0.self_attn.o_proj.bias", "model.layers.1.q_proj.weight", "model.layers.1.q_proj.bias", "model.layers.1.self_attn.o_proj.weight",
      "model.weight",                 "model.bias"};
  CHECK(names == expected);
  CHECK(elements == 30 + 5 * 12 + 4 * 4);

  for_each_parameter([](std::string_view, Parameter& p) { p.value = AnyTensor(Tensor<float>(p.shape)); }, tower);
  int present = 0;
  for_each_parameter([&](std::string_view, const Parameter& p) { present += p.present() ? 1 : 0; }, tower);
  CHECK(present == 10);
  CHECK_FALSE(tower.layers[1].o_proj.bias.present());
  CHECK(tower.layers[0].q_proj.weight.value.shape() == Shape{4, 3});
}

TEST_CASE("FunctionRef") {
  int calls = 0;
  auto add = [&](int n) { return calls += n; };
  const FunctionRef<int(int)> ref = add;
  CHECK(ref(2) == 2);
  CHECK(ref(3) == 5);
  CHECK(static_cast<bool>(ref));
  CHECK_FALSE(static_cast<bool>(FunctionRef<void()>()));
  const FunctionRef<int(int)> copy = ref;
  CHECK(copy(1) == 6);
}

}  // namespace

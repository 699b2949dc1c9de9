// xtensor and the library share elements in both directions, and an expression nobody has computed yet stands for a picture.
// labels: xtensor
#include <m2lm/xtensor.hpp>

#include <doctest/doctest.h>

#include <support.hpp>
#include <support/xtensor.hpp>

#include <limits>

using m2lm::AnyTensor;
using m2lm::Image;
using m2lm::InputError;
using m2lm::Shape;
using m2lm::ShapeError;
using m2lm::Tensor;
using m2lm_test::has;
using m2lm_test::message_of;

namespace {

Tensor<float> counted(const Shape& shape) {
  Tensor<float> out(shape);
  for (std::int64_t i = 0; i < out.elements(); ++i) out.data()[i] = static_cast<float>(i);
  return out;
}

}  // namespace

TEST_CASE("a view is an xtensor array of the same elements, strides included") {
  Tensor<float> t = counted({3, 5});
  auto columns = m2lm::as_xtensor(t.view<2>().columns(1, 4));
  CHECK(columns.shape()[0] == 3);
  CHECK(columns.shape()[1] == 3);
  CHECK(&columns(2, 1) == t.data() + 12);
  columns *= 2.0F;
  CHECK(t.data()[12] == 24.0F);
  CHECK(t.data()[10] == 10.0F);
  const auto read_only = m2lm::as_xtensor(m2lm::Matrix<const float>(t.view<2>()));
  static_assert(std::is_same_v<decltype(read_only.data()), const float*>);
  CHECK(xt::sum(read_only)() == doctest::Approx(105.0 + 1 + 2 + 3 + 6 + 7 + 8 + 11 + 12 + 13));
  // A dimension of one is broadcast, as xtensor has it.
  const xt::xarray<float> sum = m2lm::as_xtensor(t.view<2>().rows(0, 1)) + m2lm::as_xtensor(t.view<2>());
  CHECK(sum(2, 4) == t.data()[4] + t.data()[14]);
  CHECK(m2lm::as_xtensor(m2lm::Matrix<float>(nullptr, {0, 3})).size() == 0);
}

TEST_CASE("a tensor is an xtensor array of run-time rank") {
  Tensor<float> t = counted({2, 3, 4});
  auto a = m2lm::as_xarray(t);
  CHECK(a.dimension() == 3);
  CHECK(a.data() == t.data());
  a(1, 2, 3) = -1.0F;
  CHECK(t.data()[23] == -1.0F);
  CHECK(m2lm::as_xarray(std::as_const(t))(1, 2, 2) == 22.0F);
}

TEST_CASE("containers and strided views of xtensor are views of the same elements") {
  xt::xtensor<double, 2> fixed = {{1, 2, 3}, {4, 5, 6}};
  m2lm::Matrix<double> view = m2lm::as_view(fixed);
  CHECK(view.data() == fixed.data());
  view(1, 2) = 60.0;
  CHECK(fixed(1, 2) == 60.0);
  const auto& constant = fixed;
  static_assert(std::is_same_v<decltype(m2lm::as_view(constant)), m2lm::Matrix<const double>>);

  xt::xarray<float> dynamic = xt::arange<float>(24.0F).reshape({2, 3, 4});
  CHECK(m2lm::as_view<3>(dynamic)(1, 1, 1) == 17.0F);
  CHECK(has(message_of<ShapeError>([&] { (void)m2lm::as_view<2>(dynamic); }), "a view of rank 2 of an xtensor expression of shape [2, 3, 4]"));
  auto part = xt::view(dynamic, 1, xt::range(0, 2), xt::range(1, 4, 2));
  const auto part_view = m2lm::as_view<2>(part);
  CHECK(part_view.extent(0) == 2);
  CHECK(part_view(1, 1) == 19.0F);
  CHECK(&part_view(0, 0) == &dynamic(1, 0, 1));
  xt::xtensor<float, 2, xt::layout_type::column_major> columns = {{1, 2}, {3, 4}};
  CHECK(m2lm::as_view(columns)(1, 0) == 3.0F);
  // xtensor's stride of a dimension of one is 0; ours lets the rows be told apart from a broadcast.
  xt::xtensor<float, 2> column = {{1}, {2}, {3}};
  CHECK(m2lm::as_view(column).contiguous());
  CHECK(m2lm::as_view(column).stride(1) == 1);
}

TEST_CASE("expressions are computed into tensors; a container that is given away is not copied") {
  xt::xarray<float> a = xt::arange<float>(6.0F).reshape({2, 3});
  const Tensor<float> t = m2lm::to_tensor(xt::transpose(a) * 2.0F + 1.0F);
  CHECK(t.shape() == Shape{3, 2});
  CHECK(t.view<2>()(2, 1) == 11.0F);
  CHECK(has(message_of<ShapeError>([] { (void)m2lm::to_tensor(xt::xarray<float>(xt::zeros<float>({1, 1, 1, 1, 1, 1, 1}))); }), "a tensor has at most 6"));

  const AnyTensor lazy = m2lm::to_any_tensor(a > 2.0F);
  CHECK(lazy.dtype() == m2lm::DType::boolean);
  CHECK((lazy.at(2) == 0.0 && lazy.at(3) == 1.0));
  CHECK(m2lm::to_any_tensor(a).data() != reinterpret_cast<const std::byte*>(a.data()));
  const float* before = a.data();
  const AnyTensor given = m2lm::to_any_tensor(std::move(a));
  CHECK(given.data() == reinterpret_cast<const std::byte*>(before));
  CHECK(given.shape() == Shape{2, 3});
  CHECK(given.at(5) == 5.0);
}

TEST_CASE("arrays of NumPy's files are xtensor's, and back") {
  const AnyTensor file = m2lm::load_npy(m2lm_test::golden("numpy/f4.npy"));
  const auto array = m2lm::as_xarray<float>(file);
  CHECK(array.dimension() == 3);
  CHECK(xt::allclose(array * 8.0F, xt::arange<float>(24.0F).reshape({2, 3, 4})));
  CHECK(has(message_of<ShapeError>([&] { (void)m2lm::as_xarray<double>(file); }), "the tensor holds f32, asked for is f64"));
  const AnyTensor odd(m2lm::DType::f32, Shape{1}, file.data() + 1, file.owner());
  CHECK(has(message_of<ShapeError>([&] { (void)m2lm::as_xarray<float>(odd); }), "unaligned"));
  const m2lm_test::TemporaryDirectory dir;
  m2lm::save_npy(dir / "x.npy", m2lm::to_any_tensor(xt::cast<float>(array)));
  CHECK(m2lm::read_file(dir / "x.npy") == m2lm::read_file(m2lm_test::golden("numpy/f4.npy")));
}

TEST_CASE("lazy expressions are pictures") {
  const Image picture = m2lm::load_image(m2lm_test::source_file("assets/easy-vqa/pictures/0.png"));
  const auto pixels = m2lm::as_xtensor(picture);
  CHECK(pixels.shape()[2] == 3);
  CHECK(m2lm::to_image(pixels).pixels == picture.pixels);
  CHECK(m2lm::to_image(pixels / 255.0F).pixels == picture.pixels);
  CHECK(m2lm::to_image(xt::cast<int>(pixels)).pixels == picture.pixels);
  const Image mirrored = m2lm::to_image(xt::flip(pixels, 1));
  CHECK(mirrored.pixels[0] == pixels(0, static_cast<std::size_t>(picture.width) - 1, 0));
  const Image masked = m2lm::to_image(xt::where(xt::cast<int>(pixels) > 127, 255, 0));
  CHECK((masked.pixels[0] == 255 || masked.pixels[0] == 0));
  const Image grey = m2lm::to_image(xt::view(pixels, xt::all(), xt::all(), 1));
  CHECK(grey.pixels[0] == grey.pixels[2]);
  CHECK(grey.width == picture.width);
  Image changed = picture;
  m2lm::as_xtensor(changed)(0, 1, 2) = 77;
  CHECK(changed.pixels[5] == 77);

  const auto refused = [](const auto& e) { return message_of<InputError>([&] { (void)m2lm::to_image(e); }); };
  CHECK(has(refused(xt::cast<float>(pixels)), "is not between 0 and 1, as floating-point pictures have them"));
  CHECK(has(refused(xt::cast<int>(pixels) - 256), "the value -"));
  CHECK(has(refused(xt::xtensor<float, 2>{{0.0F, std::numeric_limits<float>::quiet_NaN()}}), "the value nan at row 0, column 1, channel 0"));
  CHECK(has(refused(xt::xtensor<float, 1>{0.0F}), "this is [1]"));
  CHECK(has(refused(xt::transpose(pixels, {2, 0, 1})), "xt::transpose(x, {1, 2, 0}) puts the channels last"));
}

TEST_CASE("lazy expressions are masks") {
  const Image picture = m2lm::load_image(m2lm_test::source_file("assets/easy-vqa/pictures/0.png"));
  const auto pixels = m2lm::as_xtensor(picture);
  const auto red = xt::view(pixels, xt::all(), xt::all(), 0);
  const auto expected = m2lm::to_image(xt::where(xt::view(pixels, xt::all(), xt::all(), xt::range(0, 1)) > 127, 9, xt::cast<int>(pixels)));
  CHECK(expected.pixels != picture.pixels);
  CHECK(m2lm::masked_fill(picture, red > 127, {9, 9, 9}).pixels == expected.pixels);
  CHECK(m2lm::masked_fill(pixels / 255.0, red > 127, {9, 9, 9}).pixels == expected.pixels);
  CHECK(m2lm::masked_fill(picture, xt::view(pixels, xt::all(), xt::all(), xt::range(0, 1)) > 127, {9, 9, 9}).pixels == expected.pixels);
  const xt::xtensor<bool, 2> computed = red > 127;
  CHECK(m2lm::masked_fill(pixels, computed, {9, 9, 9}).pixels == expected.pixels);
  CHECK(m2lm::masked_fill(picture, m2lm::as_view(computed), {9, 9, 9}).pixels == expected.pixels);
  CHECK(has(message_of<InputError>([&] { (void)m2lm::masked_fill(picture, pixels > 127, {}); }), "a mask is [height, width], this one [64, 64, 3]"));
  CHECK(has(message_of<InputError>([&] { (void)m2lm::masked_fill(picture, xt::xtensor<bool, 2>{{true}}, {}); }),
            "the mask is [1, 1], the picture has 64 rows of 64 pixels"));
}

TEST_CASE("an expression enters the functions of pictures, prompts and models as a picture does") {
  const Image picture = m2lm::load_image(m2lm_test::source_file("assets/easy-vqa/pictures/0.png"));
  const auto lazy = m2lm::as_xtensor(picture) / 255.0;
  const auto config = m2lm::clip_image_processor(64);
  const Tensor<float> from_lazy = m2lm::preprocess(lazy, config), from_picture = m2lm::preprocess(picture, config);
  CHECK(m2lm::as_xarray(from_lazy) == m2lm::as_xarray(from_picture));
  CHECK(m2lm::resize(lazy, 7, 5).pixels == m2lm::resize(picture, 7, 5).pixels);
  CHECK(m2lm::center_crop(lazy, 9, 9).pixels == m2lm::center_crop(picture, 9, 9).pixels);
  CHECK(m2lm::pad_to_square(lazy, {1, 2, 3}).pixels == m2lm::pad_to_square(picture, {1, 2, 3}).pixels);
  const m2lm_test::TemporaryDirectory dir;
  m2lm::save_png(dir / "lazy.png", lazy);
  CHECK(m2lm::load_image(dir / "lazy.png").pixels == picture.pixels);

  using Vlm = m2lm::Model<m2lm::Cpu, m2lm::Precision{}, m2lm::LlamaDecoder<>, m2lm::Modality<"image", m2lm::ClipVit<>, m2lm::MlpProjector<2>>>;
  const Vlm model = Vlm::from_pretrained(m2lm_test::source_file("assets/easy-vqa"));
  const Tensor<float> encoded = model.encode<"image">(lazy), expected = model.encode<"image">(picture);
  CHECK(m2lm::as_xarray(encoded) == m2lm::as_xarray(expected));
  auto prompt = model.prompt("<image>\nWhat shape is in the image?"), same = prompt;
  prompt.attach<"image">(lazy);
  same.attach<"image">(picture);
  CHECK(model.generate(prompt, {.max_new_tokens = 8}).text == model.generate(same, {.max_new_tokens = 8}).text);
}

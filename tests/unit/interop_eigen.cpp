// Eigen maps and views share elements in both directions, with strides.
#include <doctest/doctest.h>

#include <m2lm/core/tensor.hpp>
#include <m2lm/interop/eigen.hpp>

TEST_CASE("a view is an Eigen map of the same elements") {
  m2lm::Tensor<float> t(m2lm::Shape{3, 5});
  for (int i = 0; i < 15; ++i) t.data()[i] = static_cast<float>(i);
  const auto columns = t.view<2>().columns(1, 4);
  auto map = m2lm::as_eigen(columns);
  CHECK(map.rows() == 3);
  CHECK(map.cols() == 3);
  CHECK(map(2, 1) == 12.0F);
  map *= 2.0F;
  CHECK(columns(2, 1) == 24.0F);
  CHECK(t.view<2>()(2, 0) == 10.0F);
  const m2lm::Matrix<const float> read_only = t.view<2>();
  CHECK(m2lm::as_eigen(read_only).sum() == doctest::Approx(t.view<2>()(0, 0) + m2lm::as_eigen(read_only).bottomRows(2).sum() + m2lm::as_eigen(read_only).row(0).tail(4).sum()));
}

TEST_CASE("an Eigen matrix of either order is a view of the same elements") {
  Eigen::MatrixXd by_columns = Eigen::MatrixXd::Random(4, 3);
  auto view = m2lm::as_view(by_columns);
  CHECK(view.extent(0) == 4);
  CHECK(view(3, 2) == by_columns(3, 2));
  view(1, 2) = 7.0;
  CHECK(by_columns(1, 2) == 7.0);
  Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> by_rows = Eigen::MatrixXf::Random(2, 6);
  auto block = by_rows.block(0, 2, 2, 3);
  auto block_view = m2lm::as_view(block);
  CHECK(block_view(1, 2) == by_rows(1, 4));
  Eigen::MatrixXf none(0, 3);
  CHECK(m2lm::as_view(none).elements() == 0);
}

TEST_CASE("vectors, const matrices and blocks that have no name") {
  m2lm::Tensor<float> t(m2lm::Shape{3, 4});
  for (int i = 0; i < 12; ++i) t.data()[i] = static_cast<float>(i);
  auto column = m2lm::as_eigen(m2lm::Vector<float>(t.data() + 1, {3}, {4}));
  CHECK(column.sum() == 1.0F + 5.0F + 9.0F);
  column(2) = -9.0F;
  CHECK(t.data()[9] == -9.0F);
  CHECK(m2lm::as_eigen(m2lm::Vector<const float>(t.data(), {4})).norm() == doctest::Approx(std::sqrt(14.0)));

  Eigen::MatrixXf matrix = Eigen::MatrixXf::Random(4, 5);
  const Eigen::MatrixXf& constant = matrix;
  static_assert(std::is_same_v<decltype(m2lm::as_view(constant)), m2lm::Matrix<const float>>);
  CHECK(m2lm::as_view(constant)(3, 4) == matrix(3, 4));
  CHECK(m2lm::as_view(matrix.middleCols(1, 2))(3, 1) == matrix(3, 2));
  CHECK(m2lm::as_view(matrix.row(2))(0, 4) == matrix(2, 4));
  const auto nested = m2lm::as_eigen(m2lm::as_view(matrix));
  CHECK(nested.isApprox(matrix));
}

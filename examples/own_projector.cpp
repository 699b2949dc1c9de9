// A projector of one's own between CLIP and LLaMA: it averages neighbouring patches, so that a picture costs the decoder a
// quarter of the tokens, and then applies the checkpoint's own two layers. The spec is a type in the user's namespace; the
// library finds what it needs by name. Its gradient, which training needs, is checked.
// usage: own_projector MODEL PICTURE
#include <m2lm/m2lm.hpp>
#include <m2lm/testing/gradient_check.hpp>

#include <cstdio>
#include <exception>

namespace mine {

/// Spec: means of 2 × 2 patches of a square grid, then an MLP whose keys are those of LLaVA's projector.
template <int Depth>
struct PoolingProjector {
  template <class B, m2lm::Precision P>
  class On {
    using S = m2lm::ScalarOf<B>;
    typename m2lm::MlpProjector<Depth>::template On<B, P> mlp_;

    static std::int64_t side(std::int64_t tokens) {
      std::int64_t n = 1;
      while (n * n < tokens) ++n;
      m2lm::require(n * n == tokens && n % 2 == 0, "mine::PoolingProjector: ", tokens, " patches do not form a square with an even side");
      return n;
    }

   public:
    explicit On(const m2lm::ProjectorConfig& config) : mlp_(config) {}

    // The parameters, as they are called in the checkpoint. An empty name adds nothing to the path.
    template <class V, class Self>
    static void fields(V&& visit, Self& self) {
      visit("", self.mlp_);
    }
    void prepare(m2lm::Context<B>& ctx, m2lm::DType format) { mlp_.prepare(ctx, format); }

    /// Rows that `tokens` rows of features become.
    std::int64_t output_tokens(std::int64_t tokens) const {
      const std::int64_t n = side(tokens);
      return n * n / 4;
    }
    struct Saved {
      typename m2lm::MlpProjector<Depth>::template On<B, P>::Saved mlp;
    };
    /// requires x [tokens, input width], y [output_tokens(tokens), output width].
    void forward(m2lm::Context<B>& ctx, m2lm::Matrix<const S> x, m2lm::Matrix<S> y, Saved* saved = nullptr) const {
      const m2lm::Arena::Scope scope(ctx.arena);  // what is taken below is given back at the end of the block
      const std::int64_t n = side(x.extent(0)), half = n / 2;
      const m2lm::Matrix<S> means = ctx.storage(saved != nullptr).template matrix<S>(half * half, x.extent(1));
      for (std::int64_t i = 0; i < half; ++i)
        for (std::int64_t j = 0; j < half; ++j)
          for (std::int64_t c = 0; c < x.extent(1); ++c) {
            const std::int64_t corner = 2 * i * n + 2 * j;
            means(i * half + j, c) = (x(corner, c) + x(corner + 1, c) + x(corner + n, c) + x(corner + n + 1, c)) / 4;
          }
      mlp_.forward(ctx, means, y, saved ? &saved->mlp : nullptr);
    }

    // Each of the four patches gets a quarter of what their mean gets.
    void backward(m2lm::Context<B>& ctx, m2lm::Matrix<const S> dy, const Saved& saved, m2lm::Gradients<S>& gradients, m2lm::Matrix<S> dx) const {
      const m2lm::Arena::Scope scope(ctx.arena);
      if (dx.data() == nullptr) return mlp_.backward(ctx, dy, saved.mlp, gradients, {});  // nobody below is trained
      const std::int64_t n = side(dx.extent(0)), half = n / 2;
      const m2lm::Matrix<S> dmeans = ctx.arena.template matrix<S>(half * half, dx.extent(1));
      mlp_.backward(ctx, dy, saved.mlp, gradients, dmeans);
      for (std::int64_t i = 0; i < n; ++i)
        for (std::int64_t j = 0; j < n; ++j)
          for (std::int64_t c = 0; c < dx.extent(1); ++c) dx(i * n + j, c) = dmeans(i / 2 * half + j / 2, c) / 4;
    }
  };
};

}  // namespace mine

using Plain = m2lm::Model<m2lm::Cpu, m2lm::Precision{}, m2lm::LlamaDecoder<>, m2lm::Modality<"image", m2lm::ClipVit<>, m2lm::MlpProjector<2>>>;
using Pooled = m2lm::Model<m2lm::Cpu, m2lm::Precision{}, m2lm::LlamaDecoder<>, m2lm::Modality<"image", m2lm::ClipVit<>, mine::PoolingProjector<2>>>;

namespace {

/// Is `backward` the derivative of `forward`?
m2lm::testing::GradientReport check_gradients() {
  const m2lm::ProjectorConfig config{.input_width = 5, .output_width = 7};
  const auto make = [&]<class B>() { return mine::PoolingProjector<2>::On<B, m2lm::Precision{}>(config); };
  return m2lm::testing::gradient_check(make, m2lm::Shape{16, 5}, m2lm::Shape{4, 7});  // of the input, of the output
}

}  // namespace

int main(int argc, char** argv) try {
  const char* directory = argc > 1 ? argv[1] : "assets/easy-vqa";
  const m2lm::Image picture = m2lm::load_image(argc > 2 ? argv[2] : "assets/easy-vqa/pictures/0.png");
  const auto describe = [&](const auto& model, const char* name) {
    auto prompt = model.prompt("<image>\nDescribe the image.");
    prompt.template attach<"image">(picture);
    const m2lm::Generation answer = model.generate(prompt, {.max_new_tokens = 16});
    const std::int64_t rows = model.template encode<"image">(picture).shape()[0];
    std::printf("%-8s %3lld rows per picture, prompt of %3lld: %s\n", name, static_cast<long long>(rows),
                static_cast<long long>(answer.timings.prefill_tokens), answer.text.c_str());
    return rows;
  };
  // The pooled model was never trained: only its shapes are right.
  const std::int64_t plain = describe(Plain::from_pretrained(directory), "plain"), pooled = describe(Pooled::from_pretrained(directory), "pooled");
  const m2lm::testing::GradientReport gradients = check_gradients();
  std::printf("%s\n", gradients.string().c_str());
  return pooled * 4 == plain && gradients.passed ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "own_projector: %s\n", error.what());
  return 1;
}

// The bundled model on easy-VQA's test questions: accuracy, the same with the pictures shuffled (does it look?), and equality with
// the answers that transformers gives with the same checkpoint (tests/golden/easy_vqa_answers*.txt, one per line).
// labels: serial no-sanitizer
#include <doctest/doctest.h>

#include <m2lm/m2lm.hpp>

#include "support/environment.hpp"

#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

using namespace m2lm;

namespace {

using Vlm = Model<Cpu, Precision{.weights = DType::f32}, LlamaDecoder<>, Modality<"image", ClipVit<>, MlpProjector<2>>>;

struct Question {
  std::string text, answer;
  std::int64_t image = 0;
};

std::vector<Question> read_questions() {
  const ConfigValue list = ConfigValue::parse_file(m2lm_test::asset_file("data/easy_vqa/test/questions.json"));
  std::vector<Question> out;
  for (std::size_t i = 0; i < list.size(); ++i) {
    const ConfigValue q = list.at(i);
    out.push_back({q.at(0).as<std::string>(), q.at(1).as<std::string>(), q.at(2).as<std::int64_t>()});
  }
  return out;
}

std::vector<std::string> read_lines(const std::string& path) {
  std::vector<std::string> lines;
  const std::string text = read_file(path);
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    lines.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return lines;
}

/// Answers to every `step`th question, each about picture `picture_of(image)`. Questions are spread over the cores; a picture is
/// encoded once.
std::vector<std::string> answers(DType precision, const std::vector<Question>& questions, std::size_t step, std::int64_t multiplier, std::int64_t offset) {
  const Vlm model = Vlm::from_pretrained(m2lm_test::source_file("assets/easy-vqa"), Cpu{{.threads = 1}}, {.precision = Precision{.weights = precision}});
  std::int64_t pictures = 0;
  for (const Question& q : questions) pictures = std::max(pictures, q.image + 1);
  std::vector<AnyTensor> embeddings(static_cast<std::size_t>(pictures));
  std::vector<std::string> out(questions.size());
  std::string failure;
  std::mutex mutex;
  const auto on_all_cores = [&](std::size_t count, auto work) {
    std::atomic<std::size_t> next{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < ThreadPool::available_cores(); ++t)
      threads.emplace_back([&] {
        try {
          for (std::size_t i = next++; i < count; i = next++) work(i);
        } catch (const std::exception& error) {
          const std::lock_guard lock(mutex);
          failure = error.what();
          next = count;
        }
      });
    for (std::thread& t : threads) t.join();
    REQUIRE_MESSAGE(failure.empty(), failure);
  };
  on_all_cores(embeddings.size(), [&](std::size_t i) {
    embeddings[i] = AnyTensor(model.encode<"image">(load_image(m2lm_test::asset_file("data/easy_vqa/test/images/" + std::to_string(i) + ".png"))));
  });
  on_all_cores((questions.size() + step - 1) / step, [&](std::size_t n) {
    const Question& q = questions[n * step];
    auto prompt = model.prompt("<image>\n" + q.text);
    prompt.attach_embeddings<"image">(embeddings[static_cast<std::size_t>((q.image * multiplier + offset) % pictures)]);
    out[n * step] = model.generate(prompt, {.max_new_tokens = 16}).text;
  });
  return out;
}

double share_equal(const std::vector<std::string>& got, const std::vector<std::string>& wanted, std::size_t step = 1) {
  std::size_t equal = 0, count = 0;
  for (std::size_t i = 0; i < got.size(); i += step, ++count) equal += got[i] == wanted[i] ? 1U : 0U;
  return static_cast<double>(equal) / static_cast<double>(count);
}

}  // namespace

TEST_CASE("easy-VQA: accuracy, and equality with transformers") {
  M2LM_SKIP_WITHOUT(m2lm_test::asset_file("data/easy_vqa/test/questions.json"));
  const std::vector<Question> questions = read_questions();
  REQUIRE(questions.size() == 9673);
  std::vector<std::string> truth;
  for (const Question& q : questions) truth.push_back(q.answer);
  const std::vector<std::string> reference = read_lines(m2lm_test::source_file("tests/golden/easy_vqa_answers.txt"));
  REQUIRE(reference.size() == questions.size());

  const std::vector<std::string> f32 = answers(DType::f32, questions, 1, 1, 0);
  MESSAGE("f32: " << 100 * share_equal(f32, truth) << " % right, " << 100 * share_equal(f32, reference) << " % as transformers");
  CHECK(share_equal(f32, truth) >= 0.98);
  CHECK(share_equal(f32, reference) == 1.0);

  const std::vector<std::string> bf16 = answers(DType::bf16, questions, 1, 1, 0);
  MESSAGE("bf16: " << 100 * share_equal(bf16, truth) << " % right, " << 100 * share_equal(bf16, reference) << " % as transformers");
  CHECK(share_equal(bf16, truth) >= 0.98);
  CHECK(share_equal(bf16, reference) >= 0.995);
}

TEST_CASE("easy-VQA: with the pictures shuffled the answers are worse, so the model looks") {
  M2LM_SKIP_WITHOUT(m2lm_test::asset_file("data/easy_vqa/test/questions.json"));
  const std::vector<Question> questions = read_questions();
  std::vector<std::string> truth;
  for (const Question& q : questions) truth.push_back(q.answer);
  const std::vector<std::string> reference = read_lines(m2lm_test::source_file("tests/golden/easy_vqa_answers_shuffled.txt"));
  REQUIRE(reference.size() == questions.size());
  constexpr std::size_t step = 4;
  const std::vector<std::string> shuffled = answers(DType::f32, questions, step, 7919, 13);
  MESSAGE("shuffled: " << 100 * share_equal(shuffled, truth, step) << " % right, " << 100 * share_equal(shuffled, reference, step) << " % as transformers");
  CHECK(share_equal(shuffled, truth, step) < 0.70);
  CHECK(share_equal(shuffled, reference, step) == 1.0);
}

// m2lm-vqa: answers questions about pictures: one, those of a file, or a conversation.
#include "common.hpp"

#include <iostream>
#include <map>

namespace {

namespace fs = std::filesystem;

/// A line of --questions. No pictures of its own: those of the command line.
struct Question {
  std::string text;
  std::vector<std::string> images;
};

/// Lines {"question": …}, optionally with "image": a path, or a list of paths, relative to the file.
std::vector<Question> read_questions(const std::string& path) {
  std::vector<Question> questions;
  for (const m2lm::ConfigValue& line : m2lm::parse_json_lines(path)) {
    Question q{.text = line.get<std::string>("question"), .images = {}};
    if (line.has_value("image")) {
      if (line["image"].is_array())
        q.images = line.get_list<std::string>("image");
      else
        q.images.push_back(line.get<std::string>("image"));
    }
    for (std::string& image : q.images) image = (fs::path(path).parent_path() / image).string();
    questions.push_back(std::move(q));
  }
  return questions;
}

/// Encodes each picture once.
template <class M>
class Pictures {
  const M& model_;
  program::Report& report_;
  std::map<std::string, m2lm::AnyTensor> features_;

 public:
  Pictures(const M& model, program::Report& report) : model_(model), report_(report) {}

  std::vector<m2lm::AnyTensor> features(const std::vector<std::string>& paths) {
    std::vector<m2lm::AnyTensor> out;
    for (const std::string& path : paths) {
      auto found = features_.find(path);
      if (found == features_.end()) found = features_.emplace(path, program::encode_image(model_, path, report_)).first;
      out.push_back(found->second);
    }
    return out;
  }
};

void print_json(const std::string& question, const std::vector<std::string>& images, const m2lm::Generation& result, double image_seconds) {
  m2lm::JsonWriter json;
  json.begin_object();
  if (!images.empty()) {
    json.key("image");
    if (images.size() > 1) json.begin_array();
    for (const std::string& image : images) json.value(image);
    if (images.size() > 1) json.end_array();
  }
  json.member("question", question).member("answer", result.text);
  program::write_generation(json, result, image_seconds);
  program::print_line(json.end_object().text());
}

/// Each question in a session of its own.
template <class M>
int answer_all(const M& model, const program::Options& o, const std::vector<Question>& questions, const std::vector<std::string>& images,
               program::Report& report) {
  Pictures pictures(model, report);
  for (const Question& question : questions) {
    const double before = report.image_seconds;
    const std::vector<m2lm::AnyTensor> features = pictures.features(question.images.empty() ? images : question.images);
    const double image_seconds = report.image_seconds - before;
    const auto prompt = program::image_prompt(model, question.text, features);
    if (!o.dump.empty()) program::write_dump(model, prompt, features, o.dump);
    const m2lm::Generation result = program::answer(o, report, [&](const auto& options) { return model.generate(prompt, options); });
    if (o.json) print_json(question.text, question.images, result, image_seconds);
    if (result.finish_reason == m2lm::FinishReason::cancelled) return program::interrupted;
  }
  return 0;
}

/// Questions from standard input, all in one session: pictures and earlier turns stay in its cache.
template <class M>
int converse(const M& model, program::Options o, const std::vector<std::string>& images, program::Report& report) {
  const bool terminal = isatty(STDIN_FILENO) == 1 && isatty(STDOUT_FILENO) == 1;
  auto session = model.session({.seed = o.generate.seed});
  o.generate.seed = 0;  // the session's generator goes on from turn to turn
  const std::vector<m2lm::AnyTensor> features = Pictures(model, report).features(images);
  double image_seconds = report.image_seconds;
  bool first = true;
  std::string line;
  for (;;) {
    if (terminal) {
      std::fputs("> ", stdout);
      std::fflush(stdout);
    }
    if (!std::getline(std::cin, line)) break;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    if (line.back() == '\r') line.pop_back();
    const auto prompt = first ? program::image_prompt(model, line, features) : model.prompt(line);
    first = false;
    const m2lm::Generation result = program::answer(o, report, [&](const auto& options) { return session.generate(prompt, options); });
    if (o.json) print_json(line, {}, result, std::exchange(image_seconds, 0.0));
    // On a terminal an interrupt ends the answer, not the conversation.
    if (result.finish_reason == m2lm::FinishReason::cancelled && !terminal) return program::interrupted;
  }
  if (terminal) std::fputc('\n', stdout);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Answers questions about pictures. Without --question and --questions: a conversation, a question per line of standard input.",
               "m2lm-vqa");
  program::Options o;
  std::vector<std::string> images;
  std::string question, file;
  app.add_option("--image", images, "Picture (JPEG, PNG, BMP, GIF, PNM); may be given several times")->type_name("FILE")->allow_extra_args(false);
  CLI::Option* one = app.add_option("--question", question, "What to ask")->type_name("TEXT");
  CLI::Option* many =
      app.add_option("--questions", file, "File of lines {\"question\": \"…\"}, each optionally with \"image\": \"path relative to the file\"");
  many->type_name("FILE")->excludes(one);
  program::add_options(app, o);
  program::add_device(app, o);

  return program::run(app, argc, argv, [&] {
    program::check_options(o);
    if (!o.dump.empty() && one->empty()) throw program::UsageError("--dump takes the tensors of one question: give --question");
    if (images.empty() && many->empty()) throw program::UsageError("--image is required");
    std::vector<Question> questions;
    if (!one->empty()) questions.push_back({.text = question, .images = {}});
    if (!many->empty()) questions = read_questions(file);
    if (images.empty())
      for (std::size_t i = 0; i < questions.size(); ++i)
        if (questions[i].images.empty())
          throw program::UsageError(m2lm::concat("--image is required: question ", i + 1, " of ", file, " (", questions[i].text, ") names no image"));

    if (o.model.empty()) o.model = program::find_default_model();
    program::Report report;
    const int status = program::with_vlm(o, report, [&](const auto& model) {
      return one->empty() && many->empty() ? converse(model, o, images, report) : answer_all(model, o, questions, images, report);
    });
    if (o.timings) report.print();
    return status;
  });
}

// m2lm-generate: continues or answers a text with a text model.
#include "common.hpp"

int main(int argc, char** argv) {
  CLI::App app("Continues or answers a text.", "m2lm-generate");
  program::Options o;
  std::string text;
  app.add_option("--prompt", text, "The text")->required()->type_name("TEXT");
  program::add_options(app, o);
  app.get_option("--model")->required();

  return program::run(app, argc, argv, [&] {
    program::check_options(o);
    program::Report report;
    const program::TextModel model = program::load_model<program::TextModel>(o, report);
    const auto prompt = model.prompt(text);
    if (!o.dump.empty()) program::write_dump(model, prompt, {}, o.dump);
    const m2lm::Generation result = program::answer(o, report, [&](const auto& options) { return model.generate(prompt, options); });
    if (o.json) {
      m2lm::JsonWriter json;
      json.begin_object().member("prompt", text).member("text", result.text);
      program::write_generation(json, result, 0);
      program::print_line(json.end_object().text());
    }
    if (o.timings) report.print();
    return result.finish_reason == m2lm::FinishReason::cancelled ? program::interrupted : 0;
  });
}

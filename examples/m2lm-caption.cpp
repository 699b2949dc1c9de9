// m2lm-caption: says what is in pictures.
#include "common.hpp"

namespace {

/// A caption for each picture.
template <class M>
int caption(const program::Options& o, const M& model, const std::vector<std::string>& images, const std::string& text, program::Report& report) {
  int status = 0;
  for (const std::string& image : images) {
    try {
      const double before = report.image_seconds;
      const m2lm::AnyTensor features = program::encode_image(model, image, report);
      const auto prompt = program::image_prompt(model, text, {&features, 1});
      if (!o.dump.empty()) program::write_dump(model, prompt, {&features, 1}, o.dump);
      if (!o.json && images.size() > 1) std::printf("%s: ", image.c_str());
      const double image_seconds = report.image_seconds - before;
      const m2lm::Generation result = program::answer(o, report, [&](const auto& options) { return model.generate(prompt, options); });
      if (o.json) {
        m2lm::JsonWriter json;
        json.begin_object().member("image", image).member("caption", result.text);
        program::write_generation(json, result, image_seconds);
        program::print_line(json.end_object().text());
      }
      if (result.finish_reason == m2lm::FinishReason::cancelled) {
        status = program::interrupted;
        break;
      }
    } catch (const m2lm::InputError& error) {
      // One bad picture does not keep the others from their captions.
      if (images.size() == 1) throw;
      std::fprintf(stderr, "m2lm-caption: %s\n", program::plain_message(error.what()));
      status = program::bad_input;
    }
  }
  return status;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Says what is in pictures.", "m2lm-caption");
  program::Options o;
  std::vector<std::string> images;
  std::string text = "Describe the image.";
  app.add_option("image", images, "Pictures (JPEG, PNG, BMP, GIF, PNM)")->required()->type_name("IMAGE");
  app.add_option("--prompt", text, "What to say to the model")->type_name("TEXT")->capture_default_str();
  program::add_options(app, o);
  program::add_device(app, o);

  return program::run(app, argc, argv, [&] {
    program::check_options(o);
    if (!o.dump.empty() && images.size() != 1) throw program::UsageError("--dump takes the tensors of one picture: give one");
    if (o.model.empty()) o.model = program::find_default_model();
    program::Report report;
    const int status = program::with_vlm(o, report, [&](const auto& model) { return caption(o, model, images, text, report); });
    if (o.timings) report.print();
    return status;
  });
}

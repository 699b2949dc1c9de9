// m2lm-pack: writes the packed form of a checkpoint, which loading then maps instead of packing again.
#include "common.hpp"

namespace {

struct PackOptions {
  std::string model, precision = "bf16", output;
  int threads = 0;
  bool check = false;
};

/// Loads the model, which writes the file, and checks that a model can be loaded with it.
template <class M>
void pack(const PackOptions& o, const std::string& path) {
  const m2lm::Cpu cpu{{.threads = o.threads}};
  m2lm::LoadOptions options{.precision = m2lm::Precision{.weights = program::precision_of(o.precision)},
                            .check = o.check,
                            .packed_cache_mode = m2lm::PackedCacheMode::written,
                            .packed_cache = path};
  program::ProgressBar bar;
  options.progress = bar;
  M::from_pretrained(o.model, cpu, options);
  options.progress = {};
  options.check = false;
  options.packed_cache_mode = m2lm::PackedCacheMode::required;
  const std::size_t matrices = M::from_pretrained(o.model, cpu, options).load_report().mapped_matrices;
  program::print_line(m2lm::concat(path, ": ", matrices, " packed matrices, ", std::filesystem::file_size(path) >> 20, " MiB"));
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Writes the packed weights of a checkpoint to a file, which later loads use instead of packing again.", "m2lm-pack");
  PackOptions o;
  program::add_version(app);
  app.add_option("--model", o.model, "Directory of a Hugging Face checkpoint, or a GGUF file")->required()->envname("M2LM_MODEL")->type_name("PATH");
  program::add_precision(app, o.precision);
  app.add_option("--output", o.output, "The file; default: beside the checkpoint, where loading looks for it")->type_name("FILE");
  app.add_option("--threads", o.threads, "Threads to work with; 0 = one per core")->check(CLI::Range(0, 1024))->type_name("N");
  app.add_flag("--check", o.check, "Refuse a checkpoint with NaN or infinity among its weights, and name them");
  return program::run(app, argc, argv, [&] {
    const std::string path =
        o.output.empty() ? m2lm::detail::packed_cache_path(o.model, m2lm::PackedForm<m2lm::Cpu>::name, program::precision_of(o.precision)) : o.output;
    const bool sees = m2lm::detail::open_model_files(o.model, {}).config.has_value("vision_config");
    sees ? pack<program::Vlm>(o, path) : pack<program::TextModel>(o, path);
    return 0;
  });
}

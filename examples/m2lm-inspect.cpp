// m2lm-inspect: what is in a checkpoint, which model loads it, and what it would miss. No weight is read.
#include "common.hpp"

#include <map>
#include <memory>
#include <optional>

namespace {

struct TensorFact {
  std::string name, dtype, file;
  m2lm::Shape shape;
  std::size_t bytes = 0;
  m2lm::DType bound_as = m2lm::DType::f32;  ///< for the comparison with a model: blocks of a GGUF file count as f32
};

struct Facts {
  std::string layout;  ///< "Hugging Face", "LLaVA's own", "GGUF"
  std::string model_type, architecture;
  m2lm::ConfigValue config{};  ///< in transformers' words; null when there is none that can be read
  std::vector<TensorFact> tensors;
  std::optional<m2lm::Tokenizer> tokenizer;
  std::string tokenizer_kind, chat_template;
  std::vector<std::string> problems;  ///< sentences on what is not there or cannot be read
  // Of the model that loads it.
  std::string decoder, encoder, loaded_by;
  std::int64_t matrices = 0, vectors = 0;  ///< elements
  m2lm::LoadReport report{};
};

/// What a tensor takes in a format: matrices in it, vectors in f32.
struct Format {
  const char* name;
  double bits;  ///< per weight; 8 and 4 bits with an f16 scale for 32 weights
};
constexpr Format formats[] = {{"f32", 32}, {"bf16", 16}, {"8-bit", 8.5}, {"4-bit", 4.5}};

double memory(const Facts& facts, const Format& format) {
  return static_cast<double>(facts.matrices) * format.bits / 8 + static_cast<double>(facts.vectors) * 4;
}

/// Runs f; a refusal of the library becomes a sentence.
template <class F>
void attempt(Facts& facts, F&& f) {
  try {
    f();
  } catch (const m2lm::Error& error) {
    facts.problems.emplace_back(program::plain_message(error.what()));
  }
}

void read_tensors(Facts& facts, const m2lm::Checkpoint& checkpoint) {
  for (const std::string& name : checkpoint.names()) {
    TensorFact fact{.name = name, .dtype = {}, .file = std::string(checkpoint.file_of(name)), .shape = {}};
    try {
      const m2lm::AnyTensor& tensor = *checkpoint.find(name);
      fact.dtype = m2lm::dtype_name(tensor.dtype());
      fact.shape = tensor.shape();
      fact.bytes = tensor.bytes();
      fact.bound_as = tensor.dtype();
    } catch (const m2lm::CheckpointError& error) {
      fact.dtype = "?";
      fact.bound_as = m2lm::DType::u8;
      facts.problems.emplace_back(error.what());
    }
    facts.tensors.push_back(std::move(fact));
  }
}

void read_gguf(Facts& facts, const m2lm::GgufModel& gguf) {
  facts.layout = "GGUF";
  for (const m2lm::GgufModel::Source& source : gguf.sources()) {
    const m2lm::GgufFormat* format = source.file.format(source.stored);
    const m2lm::Shape& shape = source.file.shape(source.stored);
    TensorFact fact{.name = source.name, .dtype = format ? std::string(format->name) : "?", .file = source.file.path(), .shape = shape};
    if (format) fact.bytes = static_cast<std::size_t>(shape.elements()) / format->block * format->bytes;
    facts.tensors.push_back(std::move(fact));
  }
  attempt(facts, [&] { facts.config = gguf.config(); });
}

void read_directory(Facts& facts, const std::string& directory, const std::string& tower_option) {
  facts.layout = "Hugging Face";
  attempt(facts, [&] { facts.config = m2lm::ConfigValue::parse_file(m2lm::join_path(directory, "config.json")); });
  std::optional<m2lm::Checkpoint> checkpoint;
  attempt(facts, [&] { checkpoint = m2lm::Checkpoint::open(directory); });
  if (m2lm::detail::is_llava_native(facts.config)) {
    facts.layout = "LLaVA's own";
    attempt(facts, [&] {
      const std::string tower = m2lm::detail::find_llava_tower(facts.config, directory, tower_option);
      facts.config = m2lm::detail::translate_llava_config(facts.config, directory, tower);
      if (!tower.empty() && checkpoint && m2lm::directory_exists(tower)) {
        const std::vector<std::string> names = checkpoint->names();
        const bool inside =
            std::any_of(names.begin(), names.end(), [](const std::string& n) { return n.find("vision_tower.") != std::string::npos; });
        if (!inside) checkpoint = checkpoint->joined(m2lm::Checkpoint::open(tower));
      }
    });
  }
  if (checkpoint) read_tensors(facts, *checkpoint);
}

/// How text becomes tokens, and a question a prompt. Each is looked for by itself.
void read_text_side(Facts& facts, const std::string& directory, const m2lm::GgufModel* gguf) {
  attempt(facts, [&] {
    facts.tokenizer = gguf ? gguf->tokenizer() : m2lm::Tokenizer::from_directory(directory);
    const bool pieces = m2lm::file_exists(m2lm::join_path(directory, "tokenizer.model"));
    facts.tokenizer_kind = gguf ? "tokenizer.ggml" : pieces ? "tokenizer.model" : "tokenizer.json";
  });
  attempt(facts, [&] { facts.chat_template = m2lm::detail::find_chat_template(facts.config, directory, gguf).name; });
}

/// Compares what the model wants with the tensors' names and shapes.
void compare(Facts& facts, std::vector<m2lm::detail::NamedParameter> parameters) {
  static constexpr std::byte nothing{};  // no value is looked at
  std::vector<m2lm::NamedTensor> tensors;
  for (const TensorFact& t : facts.tensors) tensors.push_back({t.name, m2lm::AnyTensor(t.bound_as, t.shape, &nothing, nullptr)});
  for (const m2lm::detail::NamedParameter& p : parameters)
    (p.parameter->shape.rank() >= 2 ? facts.matrices : facts.vectors) += p.parameter->shape.elements();
  const m2lm::Checkpoint names = m2lm::Checkpoint::of_tensors("the checkpoint", std::move(tensors));
  facts.report = m2lm::detail::bind_parameters(parameters, names, m2lm::hugging_face_names);
}

/// The model that the configuration asks for: decoder, encoder and projector, as far as the library has them.
void find_model(Facts& facts) {
  using m2lm::concat;
  constexpr m2lm::Precision precision{};
  using Decoder = m2lm::LlamaDecoder<>::On<m2lm::Cpu, precision>;
  using Encoder = m2lm::ClipVit<>::On<m2lm::Cpu, precision>;
  const m2lm::ConfigValue& config = facts.config;
  const std::string type = config.get_or<std::string>("model_type", "");
  const bool sees = config.has_value("vision_config"), decodes = config.has_value("text_config") || type == "llama" || type == "mistral";
  std::vector<m2lm::detail::NamedParameter> parameters;
  const auto collect = [&](std::string_view name, m2lm::Parameter& p) { parameters.push_back({std::string(name), &p}); };

  std::optional<Decoder> decoder;
  std::optional<Encoder> encoder;
  std::shared_ptr<void> projector;
  std::string projector_type;
  if (decodes && type != "clip") {
    m2lm::LlamaConfig c;
    read_config(config, c);
    decoder.emplace(c);
    for_each_parameter(collect, *decoder);
    const m2lm::ConfigValue text = config.has_value("text_config") ? config["text_config"] : config;
    facts.decoder =
        concat(text.get_or<std::string>("model_type", "llama"), ": ", c.num_layers, " layers, hidden ", c.hidden_size, ", heads ", c.num_heads, "/",
               c.num_kv_heads, " of ", c.head_dim, ", vocabulary ", c.vocab_size, ", context ", c.max_position_embeddings);
  }
  if (sees || type == "clip_vision_model") {
    m2lm::ClipVisionConfig c;
    read_config(config, c);
    encoder.emplace(c);
    for_each_parameter(collect, *encoder, "vision_tower");
    facts.encoder = concat("CLIP: ", c.num_layers, " layers, hidden ", c.hidden_size, ", ", c.image_size, "x", c.image_size, " in patches of ",
                           c.patch_size, ", layer ", c.feature_layer, ", ", encoder->tokens(), " tokens");
  }
  if (decoder && encoder) {
    m2lm::ProjectorConfig c{.input_width = encoder->width(), .output_width = decoder->config().hidden_size};
    read_config(config, c);
    const auto make = [&]<int Layers>(std::integral_constant<int, Layers>) {
      auto made = std::make_shared<typename m2lm::MlpProjector<Layers>::template On<m2lm::Cpu, precision>>(c);
      for_each_parameter(collect, *made, "multi_modal_projector");
      projector = made;
    };
    const int layers = c.layers.value_or(2);
    if (layers == 1) make(std::integral_constant<int, 1>{});
    if (layers == 2) make(std::integral_constant<int, 2>{});
    if (layers == 3) make(std::integral_constant<int, 3>{});
    m2lm::require<m2lm::CheckpointError>(layers <= 3, "projectors of ", layers, " layers are not inspected; MlpProjector<", layers, "> may load it");
    projector_type = layers == 0 ? "m2lm::IdentityProjector" : concat("m2lm::MlpProjector<", layers, ">");
    facts.encoder += concat("; projector of ", layers, layers == 1 ? " layer" : " layers");
  }
  if (decoder && encoder)
    facts.loaded_by =
        concat("m2lm::Model<Backend, Precision, m2lm::LlamaDecoder<>, m2lm::Modality<\"image\", m2lm::ClipVit<>, ", projector_type, ">>");
  else if (decoder)
    facts.loaded_by = "m2lm::Model<Backend, Precision, m2lm::LlamaDecoder<>>";
  else if (encoder)
    facts.loaded_by = "m2lm::ClipVit<>, an encoder alone";
  else
    throw m2lm::CheckpointError(
        concat(config.file(), ": no model of the library loads model_type \"", type, "\"; llama, mistral, llava and clip are known"));
  compare(facts, std::move(parameters));
}

std::string human(double bytes) {
  char text[32];
  if (bytes >= 1024.0 * 1024 * 1024)
    std::snprintf(text, sizeof(text), "%.2f GiB", bytes / (1024.0 * 1024 * 1024));
  else
    std::snprintf(text, sizeof(text), "%.2f MiB", bytes / (1024.0 * 1024));
  return text;
}

void line(const char* key, const std::string& value) {
  program::print_line(m2lm::concat(key, std::string(16 - std::string_view(key).size(), ' '), value));
}

void print_tensors(const Facts& facts, bool summary) {
  for (const std::string& problem : facts.problems) line("problem", problem);
  if (summary) return;
  for (const TensorFact& t : facts.tensors) program::print_line(m2lm::concat(t.name, " ", t.dtype, " ", t.shape.string()));
}

void print_text(const Facts& facts, bool summary) {
  std::map<std::string, std::size_t> dtypes, files;
  std::size_t bytes = 0;
  for (const TensorFact& t : facts.tensors) {
    ++dtypes[t.dtype];
    ++files[t.file];
    bytes += t.bytes;
  }
  line("model", m2lm::concat(facts.model_type.empty() ? "?" : facts.model_type, facts.architecture.empty() ? "" : " (" + facts.architecture + ")",
                             ", ", facts.layout, " layout"));
  if (!facts.decoder.empty()) line("decoder", facts.decoder);
  if (!facts.encoder.empty()) line("image", facts.encoder);
  std::string kinds;
  for (const auto& [dtype, count] : dtypes) kinds += m2lm::concat(kinds.empty() ? "" : ", ", count, " ", dtype);
  line("tensors", m2lm::concat(facts.tensors.size(), " in ", files.size(), files.size() == 1 ? " file" : " files", ", ",
                               human(static_cast<double>(bytes)), kinds.empty() ? "" : " (" + kinds + ")"));
  if (!facts.loaded_by.empty()) {
    line("parameters", std::to_string(facts.matrices + facts.vectors));
    std::string sizes;
    for (const Format& f : formats) sizes += m2lm::concat(sizes.empty() ? "" : ", ", f.name, " ", human(memory(facts, f)));
    line("memory", sizes);
    line("loaded by", facts.loaded_by);
    for (const auto& [key, list] :
         {std::pair{"missing", &facts.report.missing}, {"other shape", &facts.report.misshaped}, {"unexpected", &facts.report.unexpected}}) {
      if (list->empty()) line(key, "nothing");
      for (const std::string& entry : *list) line(key, entry);
    }
  }
  if (!facts.loaded_by.empty() && facts.decoder.empty()) return print_tensors(facts, summary);
  line("tokenizer", facts.tokenizer ? m2lm::concat(facts.tokenizer_kind, ", ", facts.tokenizer->vocab_size(), " tokens") : "none");
  line("chat template", facts.chat_template.empty() ? "none that is known" : facts.chat_template);
  print_tensors(facts, summary);
}

void print_json(const Facts& facts) {
  m2lm::JsonWriter json;
  const auto list = [&](const char* key, const std::vector<std::string>& entries) {
    json.key(key).begin_array();
    for (const std::string& entry : entries) json.value(entry);
    json.end_array();
  };
  json.begin_object().member("model_type", facts.model_type).member("architecture", facts.architecture).member("layout", facts.layout);
  json.member("decoder", facts.decoder).member("image", facts.encoder).member("loaded_by", facts.loaded_by);
  json.member("parameters", facts.matrices + facts.vectors).key("memory").begin_object();
  for (const Format& f : formats) json.member(f.name, static_cast<std::int64_t>(memory(facts, f)));
  json.end_object();
  list("missing", facts.report.missing);
  list("misshaped", facts.report.misshaped);
  list("unexpected", facts.report.unexpected);
  list("problems", facts.problems);
  json.member("tokenizer", facts.tokenizer_kind).member("tokens", facts.tokenizer ? facts.tokenizer->vocab_size() : 0);
  json.member("chat_template", facts.chat_template).key("tensors").begin_array();
  for (const TensorFact& t : facts.tensors) {
    json.begin_object().member("name", t.name).member("dtype", t.dtype).key("shape").begin_array();
    for (const std::int64_t extent : t.shape.extents()) json.value(extent);
    json.end_array().member("bytes", t.bytes).member("file", t.file).end_object();
  }
  program::print_line(json.end_array().end_object().text());
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Says what is in a checkpoint, which model loads it, and what it would miss.", "m2lm-inspect");
  std::string directory, tower;
  bool summary = false, json = false;
  program::add_version(app);
  app.add_option("DIR", directory, "Directory of a checkpoint, or a *.gguf file")->required()->type_name("");
  app.add_option("--vision-tower", tower, "Of LLaVA's own layout: the tower's directory, or the one that it is in")->type_name("DIR");
  app.add_flag("--summary", summary, "Leave out the list of tensors");
  app.add_flag("--json", json, "One JSON object instead of text");
  app.footer("Ends with 0 when the checkpoint is complete for the model named, with 1 when it is not.");

  return program::run(app, argc, argv, [&] {
    Facts facts;
    const auto gguf = m2lm::GgufModel::find(directory);
    if (gguf) {
      read_gguf(facts, *gguf);
    } else {
      m2lm::require<m2lm::CheckpointError>(m2lm::directory_exists(directory), "there is no directory ", directory);
      read_directory(facts, directory, tower);
    }
    if (facts.config.is_object()) {
      attempt(facts, [&] {
        facts.model_type = facts.config.get_or<std::string>("model_type", "");
        if (facts.config.has_value("architectures") && facts.config["architectures"].size() > 0)
          facts.architecture = facts.config["architectures"].at(0).as<std::string>();
      });
      if (facts.config.has_value("text_config") || !m2lm::detail::is_llava_native(facts.config)) attempt(facts, [&] { find_model(facts); });
    }
    // An encoder alone has no text.
    if (facts.decoder.empty() == facts.loaded_by.empty()) read_text_side(facts, directory, gguf ? &*gguf : nullptr);
    if (json)
      print_json(facts);
    else
      print_text(facts, summary);
    return !facts.loaded_by.empty() && facts.report.complete() ? 0 : program::bad_input;
  });
}

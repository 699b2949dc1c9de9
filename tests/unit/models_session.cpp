// Sessions: conversations, limits, streaming, cancellation, sampling, and bits that depend neither on batch, chunk nor threads.
#include "models_support.hpp"

#include <m2lm/core/utf8.hpp>

#include <atomic>
#include <cmath>
#include <limits>
#include <set>

namespace {

using namespace m2lm_test;
using m2lm::FinishReason;
using m2lm::GenerateOptions;
using m2lm::Generation;

namespace t = m2lm::testing;

/// A text model of random weights without a tokenizer, loaded once.
const Lm& tiny() {
  static const Lm model = [] {
    const TemporaryDirectory directory;
    t::write_synthetic_llama(directory.path());
    return Lm::from_pretrained(directory.path(), Cpu({.threads = 2}));
  }();
  return model;
}

/// The checkpoint with a tokenizer and images.
const Vlm& talker() {
  static const Vlm model = Vlm::from_pretrained(golden("llava/with_tokenizer"), Cpu({.threads = 2}));
  return model;
}

m2lm::Image picture() { return m2lm::load_image(golden("llava/with_tokenizer/picture.png")); }

std::vector<std::int32_t> joined(std::vector<std::int32_t> a, std::span<const std::int32_t> b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

bool valid_utf8(std::string_view text) {
  m2lm::Utf8Gate gate;
  return gate.push(text) == text && gate.finish().empty();
}

}  // namespace

TEST_CASE("a session that goes on equals a fresh one with the whole text") {
  const Lm& model = tiny();
  auto session = model.session();
  CHECK(session.length() == 0);
  std::vector<std::int32_t> all = some_ids(9, 96);
  const Generation first = session.generate(model.prompt(all), {.max_new_tokens = 6, .ignore_eos = true});
  all = joined(all, first.tokens);
  // The last token has been chosen, but the decoder has not seen it.
  CHECK(session.length() == 9 + 5);
  CHECK(std::equal(session.history().begin(), session.history().end(), all.begin()));

  const std::vector<std::int32_t> next = some_ids(5, 96, 8);
  const Generation second = session.generate(model.prompt(next), {.max_new_tokens = 7, .ignore_eos = true});
  all = joined(all, next);
  CHECK(second.timings.prefill_tokens == 1 + 5);  // only what is new
  CHECK(second.timings.decode_tokens == 6);
  const Generation fresh = model.generate(model.prompt(all), {.max_new_tokens = 7, .ignore_eos = true});
  CHECK(fresh.tokens == second.tokens);
  all = joined(all, second.tokens);
  CHECK(session.length() == static_cast<std::int64_t>(all.size()) - 1);
  CHECK(std::equal(session.history().begin(), session.history().end(), all.begin()));

  // Greedy tokens are those that the logits of the whole text say.
  const Tensor<float> logits = model.logits(model.prompt(all));
  for (std::size_t i = 0; i < 7; ++i) {
    const float* row = logits.data() + (static_cast<std::int64_t>(all.size() - 8 + i)) * 96;
    CHECK(all[all.size() - 7 + i] == static_cast<std::int32_t>(std::max_element(row, row + 96) - row));
  }
}

TEST_CASE("a chat goes on with the template, and keeps its picture") {
  const Vlm& model = talker();
  auto session = model.session();
  auto prompt = model.prompt("<image>\nWhat is this?");
  prompt.attach<"image">(picture());
  const std::vector<std::int32_t> first_ids = model.input_ids(prompt);
  const Generation first = session.generate(prompt, {.max_new_tokens = 5, .ignore_eos = true});
  const Generation second = session.generate(model.prompt("And the colour?"), {.max_new_tokens = 5, .ignore_eos = true});
  const std::vector<std::int32_t> history(session.history().begin(), session.history().end());
  // What stands between the answers is the template's own text.
  const std::vector<std::int32_t> before = joined(first_ids, first.tokens);
  REQUIRE(history.size() > before.size());
  CHECK(std::equal(before.begin(), before.end(), history.begin()));
  const std::vector<std::int32_t> turn = model.tokenizer().encode(render_continuation(model.chat_template(), "And the colour?", false), false);
  const std::vector<std::int32_t> whole = joined(joined(before, turn), second.tokens);
  CHECK(std::equal(history.begin(), history.end(), whole.begin(), whole.end() - 1));

  // The same ids at once, with the picture, give the same answer.
  auto at_once = model.prompt(joined(before, turn));
  at_once.attach<"image">(picture());
  CHECK(model.generate(at_once, {.max_new_tokens = 5, .ignore_eos = true}).tokens == second.tokens);

  // A second picture in a later turn.
  auto with_image = model.prompt("<image>\nAnd here?");
  with_image.attach<"image">(picture());
  const std::int64_t length = session.length();
  session.generate(with_image, {.max_new_tokens = 1, .ignore_eos = true});
  CHECK(session.length() > length + 4);
}

TEST_CASE("a conversation's ids are those of the whole conversation rendered at once") {
  const Vlm model = Vlm::from_pretrained(source_dir() + "/assets/easy-vqa", Cpu({.threads = 1}));
  const m2lm::Image circle = m2lm::load_image(source_dir() + "/assets/easy-vqa/pictures/0.png");
  // user_assistant has no end token between turns, vicuna_v1 has one.
  for (const std::string_view name : {"user_assistant", "vicuna_v1"}) {
    CAPTURE(name);
    const m2lm::ChatTemplate& format = m2lm::chat_template(name);
    auto prompt = model.prompt("<image>\nwhat color is the shape?");
    prompt.template_name = name;
    prompt.attach<"image">(circle);
    auto next = model.prompt("what shape is in the image?");
    next.template_name = name;
    auto session = model.session();
    const std::int32_t end = *model.tokenizer().eos();
    const Generation first = session.generate(prompt, {.max_new_tokens = 8});
    session.generate(next, {.max_new_tokens = 1});
    if (name == "user_assistant") CHECK(first.tokens.back() == end);

    const std::vector<m2lm::Message> turns{{m2lm::Role::user, prompt.text}, {m2lm::Role::assistant, first.text.substr(first.text.find_first_not_of(' '))}, {m2lm::Role::user, next.text}};
    auto whole = model.raw_prompt(m2lm::render(format, turns));
    whole.attach<"image">(circle);
    if (first.tokens.back() == end) {
      const std::vector<std::int32_t> ids = model.input_ids(whole);
      CHECK(std::vector<std::int32_t>(session.history().begin(), session.history().end()) == ids);
    }
  }
}

TEST_CASE("an answer that ends with a placeholder's id does not block the session") {
  const Vlm& model = talker();
  const std::int32_t image_id = *model.tokenizer().token_id("<image>");
  // Whatever was chosen last goes in front of the next ids as it is, also when it looks like a placeholder.
  m2lm::detail::TokenSequence sequence{.ids = {5, image_id, image_id, 6}, .media = {{.component = 0, .instance = 0, .begin = 1, .rows = 2}}};
  sequence.prepend(std::vector<std::int32_t>{image_id});
  CHECK(sequence.ids == std::vector<std::int32_t>{image_id, 5, image_id, image_id, 6});
  CHECK(sequence.media.front().begin == 2);
}

TEST_CASE("a system message in the middle of a conversation is refused") {
  const Vlm& model = talker();
  auto session = model.session();
  session.generate(model.prompt("Hello"), {.max_new_tokens = 2, .ignore_eos = true});
  auto prompt = model.prompt("And now?");
  prompt.system = "Be brief.";
  CHECK_THROWS_WITH_AS(session.generate(prompt, {.max_new_tokens = 2}), "m2lm: a system message opens a conversation; this one has begun", m2lm::InputError);
  // After ids or raw text a chat may begin, with its opening, but without another beginning of the sequence.
  auto fresh = model.session();
  fresh.generate(model.prompt(std::vector<std::int32_t>{1, 5}), {.max_new_tokens = 2, .ignore_eos = true});
  const std::int64_t length = fresh.length();
  const auto opening = static_cast<std::int64_t>(model.input_ids(model.prompt("Hello")).size());
  fresh.generate(model.prompt("Hello"), {.max_new_tokens = 1, .ignore_eos = true});
  CHECK(fresh.length() == length + 1 + opening - 1);
  CHECK(std::count(fresh.history().begin(), fresh.history().end(), 1) == 1);
}

TEST_CASE("sessions of one model do not see each other") {
  const Lm& model = tiny();
  const auto a = some_ids(8, 96, 1), b = some_ids(11, 96, 2);
  const GenerateOptions options{.max_new_tokens = 5, .ignore_eos = true};
  const Generation alone_a = model.generate(model.prompt(a), options), alone_b = model.generate(model.prompt(b), options);
  auto one = model.session(), two = model.session();
  CHECK(one.generate(model.prompt(a), options).tokens == alone_a.tokens);
  CHECK(two.generate(model.prompt(b), options).tokens == alone_b.tokens);
  auto moved = std::move(one);
  CHECK(moved.length() == 8 + 4);
  CHECK(two.length() == 11 + 4);
}

TEST_CASE("copies of a model share its weights; a session keeps them alive") {
  std::optional<Lm> model = tiny();
  const Lm copy = *model;
  CHECK(&copy.config() == &model->config());
  CHECK(&copy.load_report() == &model->load_report());
  auto session = model->session();
  const auto prompt = model->prompt(some_ids(4, 96));
  model.reset();
  CHECK(session.generate(prompt, {.max_new_tokens = 3}).tokens == copy.generate(prompt, {.max_new_tokens = 3}).tokens);
}

// ---- limits ----------------------------------------------------------------------------------------------------------------------

TEST_CASE("a prompt that is too long names both lengths and changes nothing") {
  const Lm& model = tiny();
  auto session = model.session({.max_positions = 20});
  CHECK(session.max_positions() == 20);
  session.generate(model.prompt(some_ids(6, 96)), {.max_new_tokens = 2, .ignore_eos = true});
  const std::vector<std::int32_t> history(session.history().begin(), session.history().end());
  // 7 positions are used; 1 chosen token and 13 ids need 14 more.
  const std::string message = message_of<m2lm::CapacityError>([&] { session.generate(model.prompt(some_ids(13, 96)), {.max_new_tokens = 1}); });
  CHECK_MESSAGE(has(message, "21 positions"), message);
  CHECK_MESSAGE(has(message, "holds 20"), message);
  CHECK(session.length() == 7);
  CHECK(std::equal(history.begin(), history.end(), session.history().begin(), session.history().end()));
  // One less fits.
  CHECK(session.generate(model.prompt(some_ids(12, 96)), {.max_new_tokens = 1, .ignore_eos = true}).tokens.size() == 1);
  CHECK(session.length() == 20);
}

TEST_CASE("an answer that is too long is an error that leaves the session as it was") {
  const Lm& model = tiny();
  const auto start = some_ids(6, 96), more = some_ids(3, 96, 5);
  auto session = model.session({.max_positions = 20}), twin = model.session({.max_positions = 20});
  const GenerateOptions two{.max_new_tokens = 2, .ignore_eos = true};
  session.generate(model.prompt(start), two);
  twin.generate(model.prompt(start), two);
  const std::string message = message_of<m2lm::CapacityError>([&] { session.generate(model.prompt(more), {.max_new_tokens = 50, .ignore_eos = true}); });
  CHECK_MESSAGE(has(message, "21 positions"), message);
  CHECK_MESSAGE(has(message, "holds 20"), message);
  CHECK(session.length() == twin.length());
  CHECK(std::equal(session.history().begin(), session.history().end(), twin.history().begin(), twin.history().end()));
  CHECK(session.generate(model.prompt(more), two).tokens == twin.generate(model.prompt(more), two).tokens);
}

TEST_CASE("an exception of the callback leaves the session as it was") {
  const Vlm& model = talker();
  auto session = model.session(), twin = model.session();
  const GenerateOptions options{.max_new_tokens = 4, .temperature = 1, .seed = 3, .ignore_eos = true};
  session.generate(model.prompt("One."), options);
  twin.generate(model.prompt("One."), options);
  struct Interruption {};
  const auto interrupt = [](std::string_view) { throw Interruption{}; };
  GenerateOptions interrupted = options;
  interrupted.on_text = interrupt;
  interrupted.max_new_tokens = 20;
  CHECK_THROWS_AS(session.generate(model.prompt("Two."), interrupted), Interruption);
  CHECK(session.length() == twin.length());
  GenerateOptions go_on = options;
  go_on.seed = 0;  // the generator goes on where it was
  CHECK(session.generate(model.prompt("Two."), go_on).tokens == twin.generate(model.prompt("Two."), go_on).tokens);
}

TEST_CASE("budgets and session options") {
  const Lm& model = tiny();
  const auto prompt = model.prompt(some_ids(5, 96));
  const Generation none = model.generate(prompt, {.max_new_tokens = 0});
  CHECK(none.tokens.empty());
  CHECK(none.finish_reason == FinishReason::length);
  CHECK(none.timings.prefill_tokens == 5);
  CHECK(model.generate(prompt, {.max_new_tokens = 1, .ignore_eos = true}).tokens.size() == 1);
  CHECK(has(message_of<m2lm::OptionError>([&] { model.generate(prompt, {.max_new_tokens = -1}); }), "max_new_tokens = -1"));
  // "As long as it takes": the context is the limit, and nothing is reserved beyond it.
  constexpr std::int64_t unbounded = std::numeric_limits<std::int64_t>::max();
  CHECK(has(message_of<m2lm::CapacityError>([&] { model.generate(prompt, {.max_new_tokens = unbounded, .ignore_eos = true}); }), "holds 256"));
  const auto first = model.generate(prompt, {.max_new_tokens = 1, .ignore_eos = true}).tokens;
  CHECK(model.generate(prompt, {.max_new_tokens = unbounded, .stop_tokens = first}).tokens == first);
  for (const std::int64_t positions : {std::int64_t{-1}, std::int64_t{257}}) {
    const std::string message = message_of<m2lm::OptionError>([&] { model.session({.max_positions = positions}); });
    CHECK_MESSAGE(has(message, std::to_string(positions)), message);
    CHECK_MESSAGE(has(message, "256"), message);
  }
}

TEST_CASE("sampling options out of range name themselves") {
  const Lm& model = tiny();
  const auto prompt = model.prompt(some_ids(5, 96));
  const auto said = [&](const GenerateOptions& options) { return message_of<m2lm::OptionError>([&] { model.generate(prompt, options); }); };
  CHECK(has(said({.temperature = -1}), "temperature = -1"));
  CHECK(has(said({.temperature = std::nan("")}), "temperature"));
  CHECK(has(said({.top_k = -2}), "top_k = -2"));
  CHECK(has(said({.top_p = 1.5}), "top_p = 1.5"));
  CHECK(has(said({.min_p = -0.5}), "min_p = -0.5"));
  CHECK(has(said({.repetition_penalty = 0}), "repetition_penalty = 0"));
  CHECK(has(said({.stop = {""}}), "stop string is empty"));
  CHECK(has(said({.stop = {"\xff"}}), "UTF-8"));
}

// ---- the end of an answer ----------------------------------------------------------------------------------------------------------

TEST_CASE("stop tokens, the checkpoint's and one's own") {
  const Lm& model = tiny();
  const auto prompt = model.prompt(some_ids(5, 96));
  const Generation free = model.generate(prompt, {.max_new_tokens = 20, .ignore_eos = true});
  REQUIRE(free.tokens.size() == 20);
  // A token that occurs for the first time in the middle of the answer.
  std::size_t at = 3;
  while (std::find(free.tokens.begin(), free.tokens.begin() + static_cast<std::ptrdiff_t>(at), free.tokens[at]) != free.tokens.begin() + static_cast<std::ptrdiff_t>(at)) REQUIRE(++at < 20);
  const Generation stopped = model.generate(prompt, {.max_new_tokens = 20, .stop_tokens = {free.tokens[at]}, .ignore_eos = true});
  CHECK(stopped.finish_reason == FinishReason::stop_token);
  CHECK(stopped.tokens == std::vector<std::int32_t>(free.tokens.begin(), free.tokens.begin() + static_cast<std::ptrdiff_t>(at) + 1));

  const TemporaryDirectory directory;
  t::write_synthetic_llama(directory.path());
  change_text(directory, "config.json", "\"eos_token_id\": 2", "\"eos_token_id\": [2," + std::to_string(free.tokens[at]) + "]");
  const Lm other = Lm::from_pretrained(directory.path());
  CHECK(other.generate(prompt, {.max_new_tokens = 20}).tokens == stopped.tokens);
  CHECK(other.generate(prompt, {.max_new_tokens = 20}).finish_reason == FinishReason::stop_token);
  CHECK(other.generate(prompt, {.max_new_tokens = 20, .ignore_eos = true}).tokens == free.tokens);
  // generation_config.json comes first.
  directory.write("generation_config.json", R"({"eos_token_id": 95})");
  CHECK(Lm::from_pretrained(directory.path()).generate(prompt, {.max_new_tokens = 4}).tokens.size() == 4);
}

TEST_CASE("a stop string ends the text before it, wherever the pieces are cut") {
  const Vlm& model = talker();
  const auto prompt = model.prompt("Stop?");
  const GenerateOptions options{.max_new_tokens = 40, .temperature = 1, .seed = 11, .ignore_eos = true};
  const Generation free = model.generate(prompt, options);
  REQUIRE(free.text.size() > 12);
  int checked = 0;
  for (std::size_t begin = 2; begin + 3 < free.text.size(); begin += 3) {
    const std::string stop = free.text.substr(begin, 3);
    if (!valid_utf8(stop)) continue;
    GenerateOptions with_stop = options;
    with_stop.stop = {stop, "never in the text"};
    std::string streamed;
    const auto collect = [&](std::string_view piece) { streamed += piece; };
    with_stop.on_text = collect;
    const Generation stopped = model.generate(prompt, with_stop);
    CAPTURE(stop);
    CHECK(stopped.finish_reason == FinishReason::stop_string);
    CHECK(stopped.text == free.text.substr(0, free.text.find(stop)));
    CHECK(streamed == stopped.text);
    CHECK(std::equal(stopped.tokens.begin(), stopped.tokens.end(), free.tokens.begin()));
    ++checked;
  }
  CHECK(checked > 3);
}

TEST_CASE("streamed pieces are whole characters and add up to the text") {
  const Vlm& model = talker();
  std::size_t pieces = 0, odd = 0;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    std::string streamed;
    bool all_valid = true;
    const auto collect = [&](std::string_view piece) {
      CHECK(!piece.empty());
      all_valid = all_valid && valid_utf8(piece);
      streamed += piece;
      ++pieces;
    };
    const Generation answer = model.generate(model.prompt("Talk."), {.max_new_tokens = 60, .temperature = 1.5, .seed = seed, .ignore_eos = true, .on_text = collect});
    CHECK(all_valid);
    CHECK(streamed == answer.text);
    // The model's vocabulary is padded beyond the tokenizer's: such ids stand for no text.
    std::vector<std::int32_t> known = answer.tokens;
    std::erase_if(known, [&](std::int32_t id) { return id >= model.tokenizer().vocab_size(); });
    CHECK(answer.text == model.tokenizer().decode(known));
    odd += has(answer.text, "\xEF\xBF\xBD") ? 1U : 0U;
  }
  CHECK(pieces > 200);
  CHECK(odd > 0);  // byte pieces that are no characters did occur
}

TEST_CASE("cancellation is looked at before each token") {
  const Vlm& model = talker();
  std::atomic<bool> cancel{true};
  const Generation at_once = model.generate(model.prompt("Go."), {.max_new_tokens = 30, .ignore_eos = true, .cancel = &cancel});
  CHECK(at_once.tokens.empty());
  CHECK(at_once.finish_reason == FinishReason::cancelled);
  cancel = false;
  auto session = model.session();
  int pieces = 0;
  const auto stop_soon = [&](std::string_view) { cancel = ++pieces == 3; };
  const Generation later = session.generate(model.prompt("Go."), {.max_new_tokens = 100, .ignore_eos = true, .on_text = stop_soon, .cancel = &cancel});
  CHECK(later.finish_reason == FinishReason::cancelled);
  CHECK(later.tokens.size() < 100);
  CHECK(pieces >= 3);
  cancel = false;
  CHECK(session.generate(model.prompt("On."), {.max_new_tokens = 3, .ignore_eos = true, .cancel = &cancel}).tokens.size() == 3);
}

// ---- randomness ----------------------------------------------------------------------------------------------------------------------

TEST_CASE("the same seed gives the same tokens, another one others") {
  const Lm& model = tiny();
  const auto prompt = model.prompt(some_ids(5, 96));
  const auto with_seed = [&](std::uint64_t seed) {
    return model.generate(prompt, {.max_new_tokens = 30, .temperature = 1, .top_k = 50, .top_p = 0.95, .min_p = 0.01, .repetition_penalty = 1.1, .seed = seed, .ignore_eos = true}).tokens;
  };
  const auto one = with_seed(1);
  CHECK(with_seed(1) == one);
  CHECK(with_seed(2) != one);
  CHECK(with_seed(0) == with_seed(0));

  // A session's seed rules when a call gives none; its numbers go on from call to call.
  const GenerateOptions options{.max_new_tokens = 10, .temperature = 1, .ignore_eos = true};
  auto a = model.session({.seed = 5}), b = model.session({.seed = 5}), c = model.session({.seed = 6});
  const auto first = a.generate(prompt, options).tokens;
  CHECK(b.generate(prompt, options).tokens == first);
  CHECK(c.generate(prompt, options).tokens != first);
  CHECK(a.generate(prompt, options).tokens == b.generate(prompt, options).tokens);
}

TEST_CASE("a low temperature, or one candidate, is greedy") {
  const Lm& model = tiny();
  const auto prompt = model.prompt(some_ids(5, 96));
  const auto greedy = model.generate(prompt, {.max_new_tokens = 12, .ignore_eos = true}).tokens;
  CHECK(model.generate(prompt, {.max_new_tokens = 12, .temperature = 1e-4, .seed = 4, .ignore_eos = true}).tokens == greedy);
  CHECK(model.generate(prompt, {.max_new_tokens = 12, .temperature = 2, .top_k = 1, .seed = 4, .ignore_eos = true}).tokens == greedy);
  CHECK(model.generate(prompt, {.max_new_tokens = 12, .temperature = 2, .top_p = 0, .seed = 4, .ignore_eos = true}).tokens == greedy);
}

// ---- attachments ----------------------------------------------------------------------------------------------------------------------

TEST_CASE("embeddings in the place of a picture") {
  const Vlm& model = talker();
  auto with_picture = model.prompt("<image>\nWhat?"), with_rows = model.prompt("<image>\nWhat?");
  with_picture.attach<"image">(picture());
  with_rows.attach_embeddings<"image">(AnyTensor(model.encode<"image">(picture())));
  CHECK(same_bits(model.logits(with_picture), model.logits(with_rows)));
  // Any number of rows.
  auto short_rows = model.prompt("<image>\nWhat?");
  short_rows.attach_embeddings<"image">(AnyTensor(Tensor<float>(Shape{1, 32})));
  CHECK(model.input_ids(short_rows).size() + 3 == model.input_ids(with_rows).size());

  const auto said = [&](AnyTensor rows) {
    auto prompt = model.prompt("<image>");
    prompt.attach_embeddings<"image">(std::move(rows));
    return message_of<m2lm::InputError>([&] { model.logits(prompt); });
  };
  CHECK(has(said(AnyTensor(Tensor<float>(Shape{4, 31}))), "[4, 31], expected [tokens, 32]"));
  CHECK(has(said(AnyTensor(Tensor<float>(Shape{1, 4, 32}))), "[1, 4, 32]"));
  CHECK(has(said(AnyTensor()), "image"));
  Tensor<float> broken(Shape{4, 32});
  broken.data()[40] = std::numeric_limits<float>::quiet_NaN();
  const std::string message = said(AnyTensor(std::move(broken)));
  CHECK_MESSAGE(has(message, "<image>"), message);
  CHECK_MESSAGE(has(message, "row 1"), message);
}

TEST_CASE("placeholders and attachments must match") {
  const Vlm& model = talker();
  const auto said = [&](const Vlm::PromptType& prompt) { return message_of<m2lm::InputError>([&] { model.generate(prompt, {.max_new_tokens = 1}); }); };
  CHECK(has(said(model.prompt("<image>\nWhat?")), "1 <image> placeholders, but 0 attached (image); attach one for each placeholder"));
  auto extra = model.prompt("What?");
  extra.attach<"image">(picture());
  CHECK(has(said(extra), "0 <image> placeholders, but 1 attached (image); write one placeholder for each"));
  auto two = model.prompt("<image><image>What?");
  two.attach<"image">(picture());
  CHECK(has(said(two), "2 <image> placeholders, but 1 attached"));
  two.attach<"image">(picture());
  CHECK(said(two).empty());
  // Expanded ids whose runs do not fit: 4 rows of a picture, but 3 + 5 placeholders.
  auto runs = model.prompt(std::vector<std::int32_t>{1, 340, 340, 340, 5, 340, 340, 340, 340, 340});
  runs.attach<"image">(picture());
  runs.attach<"image">(picture());
  CHECK(has(said(runs), "4 placeholders in a row; the token ids have 3"));
  CHECK(has(said(model.prompt(std::vector<std::int32_t>{})), "no tokens"));
}

TEST_CASE("ids outside the vocabulary") {
  const Lm& model = tiny();
  for (const std::int32_t id : {96, -1, 2147483647}) {
    const auto prompt = model.prompt(std::vector<std::int32_t>{5, id, 7});
    for (const std::string& message : {message_of<m2lm::InputError>([&] { model.logits(prompt); }), message_of<m2lm::InputError>([&] { model.hidden_states(prompt); }),
                                       message_of<m2lm::InputError>([&] { model.generate(prompt); })}) {
      CHECK_MESSAGE(has(message, std::to_string(id)), message);
      CHECK_MESSAGE(has(message, "96"), message);
    }
  }
  auto session = model.session();
  CHECK_THROWS_AS(session.generate(model.prompt(std::vector<std::int32_t>{5, 96})), m2lm::InputError);
  CHECK(session.length() == 0);
  CHECK(session.generate(model.prompt(some_ids(5, 96)), {.max_new_tokens = 3, .ignore_eos = true}).tokens ==
        model.generate(model.prompt(some_ids(5, 96)), {.max_new_tokens = 3, .ignore_eos = true}).tokens);
}

// ---- bits that depend on nothing but the input ------------------------------------------------------------------------------------------

TEST_CASE("a batch is bit-equal to one prompt at a time") {
  const auto check = [](const auto& model, const auto& prompts) {
    const auto together = model.logits(std::span(prompts));
    REQUIRE(together.size() == prompts.size());
    for (std::size_t i = 0; i < prompts.size(); ++i) CHECK(same_bits(together[i], model.logits(prompts[i])));
  };
  for (const DType weights : {DType::f32, DType::bf16, DType::q4})
    for (const bool dot : both_dots)
      for (const IsaLevel level : isa_levels()) {
        const Lm model = Lm::from_pretrained(golden("llama/mistral_window"), cpu_at(level, 2, dot), {.precision = Precision{.weights = weights}});
        const std::int64_t vocab = model.decoder_config().vocab_size;
        std::vector<Lm::PromptType> prompts;
        for (const std::int64_t length : {1, 17, 2, 33, 7, 20}) prompts.push_back(model.prompt(some_ids(length, vocab, static_cast<std::uint64_t>(length))));
        check(model, prompts);
      }
  const Vlm& model = talker();
  std::vector<Vlm::PromptType> prompts{model.prompt("<image>\nWhat?"), model.prompt("No picture."), model.prompt("<image><image>")};
  prompts[0].attach<"image">(picture());
  prompts[2].attach<"image">(picture()).attach<"image">(picture());
  check(model, prompts);
  CHECK(model.logits(std::span<const Vlm::PromptType>{}).empty());
}

TEST_CASE("a long prompt: in chunks as at once, with 1, 2 and 3 threads, and token by token") {
  const TemporaryDirectory directory;
  m2lm::LlamaConfig config = t::small_llama();
  config.hidden_size = 64;
  config.intermediate_size = 160;
  config.head_dim = 16;
  config.max_position_embeddings = 2048;
  config.sliding_window = 300;
  t::write_synthetic_llama(directory.path(), config);
  constexpr std::int64_t length = 1100;  // a session takes 512 at a time
  const std::vector<std::int32_t> ids = some_ids(length, config.vocab_size);
  for (const DType weights : {DType::f32, DType::bf16, DType::q8, DType::q4}) {
    Tensor<float> expected;
    for (const int threads : {1, 2, 3}) {
      const Lm model = Lm::from_pretrained(directory.path(), Cpu({.threads = threads}), {.precision = Precision{.weights = weights}});
      const Tensor<float> logits = model.logits(model.prompt(ids));
      if (threads == 1) expected = logits.clone();
      CHECK(same_bits(logits, expected));
      auto session = model.session();
      const GenerateOptions one{.max_new_tokens = 1, .ignore_eos = true};
      const Generation whole = session.generate(model.prompt(ids), one);
      CHECK(whole.timings.prefill_tokens == length);
      const float* last = expected.data() + (length - 1) * config.vocab_size;
      CHECK(whole.tokens.front() == static_cast<std::int32_t>(std::max_element(last, last + config.vocab_size) - last));
    }
    // Hidden states of a prefix are those of the whole, bit by bit; so is a cache that was filled in other pieces.
    const Lm model = Lm::from_pretrained(directory.path(), Cpu({.threads = 2}), {.precision = Precision{.weights = weights}});
    for (const std::int64_t prefix : {1, 2, 127, 128, 129, 511, 513}) {
      const Tensor<float> part = model.logits(model.prompt(std::vector<std::int32_t>(ids.begin(), ids.begin() + prefix)));
      CHECK(std::equal(part.data(), part.data() + part.elements(), expected.data()));
    }
  }
}

TEST_CASE("prefill in pieces writes the cache that prefill at once writes") {
  // The parts directly: pieces of uneven size, of one token too, against one forward pass.
  const TemporaryDirectory directory;
  m2lm::LlamaConfig config = t::small_llama();
  config.head_dim = 10;
  t::write_synthetic_llama(directory.path(), config);
  const m2lm::Checkpoint checkpoint = m2lm::Checkpoint::open(directory.path());
  const auto check = [&](Cpu backend, DType format, m2lm::Phase phase) {
    m2lm::Arena arena;
    m2lm::Context<Cpu> ctx{.backend = backend, .arena = arena, .phase = phase};
    m2lm::LlamaDecoder<>::On<Cpu, in_f32> decoder(config);
    require_complete(load_parameters(decoder, checkpoint), directory.path());
    decoder.prepare(ctx, Precision{.weights = format}, {});
    constexpr std::int64_t length = 150;
    const std::vector<std::int32_t> ids = some_ids(length, config.vocab_size);
    const auto run = [&](const std::vector<std::int64_t>& cuts) {
      Tensor<float> h(Shape{length, config.hidden_size});
      decoder.embed_tokens.forward(ctx, ids, h.view<2>());
      auto cache = decoder.make_cache(ctx, m2lm::is_quantised(format) ? DType::bf16 : format, length);
      for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
        const m2lm::SequenceRows<Cpu> rows{&cache, 0, cuts[i + 1] - cuts[i]};
        decoder.forward(ctx, h.view<2>().rows(cuts[i], cuts[i + 1]), std::span(&rows, 1));
      }
      CHECK(cache.length() == length);
      return h;
    };
    CHECK(same_bits(run({0, length}), run({0, 1, 2, 35, 36, 129, 149, length})));
  };
  for (const IsaLevel level : isa_levels())
    for (const bool dot : both_dots)
      for (const DType format : {DType::f32, DType::bf16, DType::q8, DType::q4, DType::q4_128, DType::w8a8})
        for (const m2lm::Phase phase : {m2lm::Phase::decode, m2lm::Phase::prefill}) check(cpu_at(level, 2, dot), format, phase);
}

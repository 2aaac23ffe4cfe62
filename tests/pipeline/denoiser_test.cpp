// A checkpoint's denoiser: what it takes, what it refuses, and that several devices give what one gives.
#include "pipeline/denoiser.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace comfytp::test {
namespace {

using Views = std::map<std::string, TensorView>;

float uniform(std::uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) * 0x1p-23f - 1;
}

// A narrow model of a family with random weights, in f16, as a bare checkpoint.
std::shared_ptr<weights::Source> checkpoint(const std::string& family) {
  static std::map<std::string, std::shared_ptr<weights::Source>> made;
  auto& source = made[family];
  if (source) return source;
  auto storage = std::make_shared<std::vector<std::vector<std::uint16_t>>>();
  std::map<std::string, TensorView, std::less<>> views;
  std::uint32_t state = 5;
  for (const auto& [key, info] : models::unet_tensors(family, DType::f16, 32)) {
    const auto fan_in = static_cast<float>(numel(info.shape) / std::max<std::int64_t>(1, info.shape[0]));
    const float spread = std::sqrt(3 / std::max(fan_in, 12.0f)), mean = info.shape.size() == 1 && key.ends_with("weight") ? 1.0f : 0.0f;
    auto& tensor = storage->emplace_back(static_cast<std::size_t>(numel(info.shape)));
    for (auto& v : tensor) v = float_to_f16(mean + spread * uniform(state));
    views[key] = TensorView::dense(tensor.data(), DType::f16, info.shape);
  }
  return source = weights::from_views("test checkpoint", std::move(views), storage);
}

// Random inputs of a call, by the graph's names.
struct Call {
  std::map<std::string, std::vector<float>> values;
  Views views;
  std::vector<float> result;
  TensorView output;

  Call(const models::UNet& unet, const models::UNetCall& call) {
    add("x", {call.batch, unet.in_channels, call.height, call.width});
    add("timesteps", {call.batch});
    for (auto& t : values["timesteps"]) t = std::abs(t) * 300;
    add("context", {call.batch, call.tokens, unet.context_dim});
    if (unet.label_dim) add("y", {call.batch, *unet.label_dim});
    if (call.control)
      for (const auto& [name, shape] : models::control_inputs(unet, call)) add(name, shape);
    const Shape shape = {call.batch, unet.out_channels, call.height, call.width};
    result.assign(static_cast<std::size_t>(numel(shape)), NAN);
    output = TensorView::dense(result.data(), DType::f32, shape);
  }
  void add(const std::string& name, const Shape& shape) {
    auto state = static_cast<std::uint32_t>(std::hash<std::string>()(name));
    auto& v = values[name];
    v.resize(static_cast<std::size_t>(numel(shape)));
    for (auto& x : v) x = 2 * uniform(state);
    views[name] = TensorView::dense(v.data(), DType::f32, shape);
  }
};

pipeline::DenoiserOptions options_for(const std::string& mesh, sharding::Placement placement = sharding::Placement::resident) {
  pipeline::DenoiserOptions options;
  options.heads.head_dim = 16;
  options.engine.plan.mesh = sharding::Mesh::parse(mesh);
  options.engine.plan.placement = placement;
  for (int i = 0; i < options.engine.plan.mesh.size(); ++i) options.engine.plan.devices.push_back({"cpu", i, 0});
  return options;
}

std::vector<float> run(const std::string& family, const models::UNetCall& sizes, const pipeline::DenoiserOptions& options) {
  pipeline::Denoiser denoiser(checkpoint(family), options);
  Call call(denoiser.checkpoint().unet, sizes);
  denoiser.run(call.views, call.output);
  return call.result;
}

class Families : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Models, Families, ::testing::Values("sd1", "sdxl-refiner"));

TEST_P(Families, SeveralDevicesGiveWhatOneGives) {
  const models::UNetCall sizes{2, 8, 12, 7, true};
  const auto expected = run(GetParam(), sizes, options_for("tensor=1"));
  for (float v : expected) ASSERT_TRUE(std::isfinite(v));
  for (const auto& options : {options_for("tensor=2"), options_for("batch=2"), options_for("patch=2", sharding::Placement::gathered)}) {
    const auto got = run(GetParam(), sizes, options);
    double diff = 0, norm = 0;
    for (std::size_t i = 0; i < got.size(); ++i) diff += std::pow(got[i] - expected[i], 2), norm += std::pow(expected[i], 2);
    EXPECT_LT(std::sqrt(diff / norm), 1e-5) << options.engine.plan.mesh.to_string();
  }
}

TEST(Denoiser, ReadsTheSizesOfACallOffItsInputs) {
  pipeline::Denoiser denoiser(checkpoint("sdxl-refiner"), options_for("tensor=1"));
  for (const models::UNetCall& sizes : {models::UNetCall{1, 8, 16, 77, false}, models::UNetCall{3, 9, 5, 154, true}}) {
    const Call call(denoiser.checkpoint().unet, sizes);
    const auto got = denoiser.call_of(call.views);
    EXPECT_EQ(got.batch, sizes.batch);
    EXPECT_EQ(got.height, sizes.height);
    EXPECT_EQ(got.width, sizes.width);
    EXPECT_EQ(got.tokens, sizes.tokens);
    EXPECT_EQ(got.control, sizes.control);
  }
}

TEST(Denoiser, NamesTheInputThatDoesNotFit) {
  pipeline::Denoiser sd1(checkpoint("sd1"), options_for("tensor=1")), refiner(checkpoint("sdxl-refiner"), options_for("tensor=1"));
  const auto message = [](pipeline::Denoiser& denoiser, auto change) -> std::string {
    Call call(denoiser.checkpoint().unet, {2, 8, 8, 7, false});
    change(call);
    try {
      denoiser.run(call.views, call.output);
    } catch (const Error& e) {
      return e.what();
    }
    return "no error";
  };
  EXPECT_EQ(message(sd1, [](Call&) {}), "no error");
  EXPECT_EQ(message(sd1, [](Call& c) { c.views.erase("x"); }), "[denoiser] expected an input 'x' [N,C,H,W] but got none");
  EXPECT_EQ(message(sd1, [](Call& c) { c.add("x", {2, 4, 8}); }), "[denoiser] expected input 'x' [N,C,H,W] but got shape [2,4,8]");
  EXPECT_EQ(message(sd1, [](Call& c) { c.add("x", {2, 9, 8, 8}); }),
            "[denoiser] expected input 'x' of shape [2,4,8,8] for this sd1 model but got [2,9,8,8]");
  EXPECT_EQ(message(sd1, [](Call& c) { c.add("timesteps", {1}); }),
            "[denoiser] expected input 'timesteps' of shape [2] for this sd1 model but got [1]");
  EXPECT_EQ(message(sd1, [](Call& c) { c.add("y", {2, 4}); }),
            "[denoiser] expected the inputs context, timesteps, x for this sd1 model but got 'y'");
  EXPECT_EQ(message(refiner, [](Call& c) { c.views.erase("y"); }), "[denoiser] expected an input 'y' of shape [2,2560] for this sdxl-refiner model but got none");
  EXPECT_EQ(message(sd1, [](Call& c) { c.add("control.middle", {2, 128, 1, 1}); }),
            "[denoiser] expected an input 'control.0' of shape [2,32,8,8] for this sd1 model but got none");
  EXPECT_EQ(message(sd1, [](Call& c) { c.views["x"].dtype = DType::i32; }), "[denoiser] expected input 'x' in a floating dtype but got i32");
  EXPECT_EQ(message(sd1, [](Call& c) { c.add("context", {2, 0, 768}); }),
            "[denoiser] expected no empty inputs but got 'x' of shape [2,4,8,8] and 'context' of shape [2,0,768]");
  EXPECT_EQ(message(sd1, [](Call& c) { c.output.shape[1] = 3; }), "[run] expected output 'output' of shape [2,4,8,8] but got [2,3,8,8]");
}

TEST(Denoiser, BuildsOneProgramForEachSize) {
  pipeline::Denoiser denoiser(checkpoint("sd1"), options_for("tensor=2"));
  const models::UNetCall small{1, 8, 8, 7, false}, large{2, 8, 16, 7, false};
  for (const auto& sizes : {small, large, small, large}) {
    Call call(denoiser.checkpoint().unet, sizes);
    denoiser.run(call.views, call.output);
  }
  EXPECT_EQ(denoiser.compile(small), denoiser.compile(small));
  EXPECT_EQ(denoiser.engine().stats().programs_built, 2);
  EXPECT_EQ(denoiser.engine().stats().calls, 4);
  EXPECT_EQ(denoiser.engine().stats().prologues, 2);
}

}  // namespace
}  // namespace comfytp::test

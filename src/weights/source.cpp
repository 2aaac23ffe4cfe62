#include "weights/source.h"

#include <fmt/ranges.h>

#include "base/error.h"

namespace comfytp::weights {
namespace {

std::string to_string(const Box& box) {
  std::vector<std::string> parts;
  for (auto i : box) parts.push_back(fmt::format("{}:{}", i.lo, i.hi));
  return fmt::format("[{}]", fmt::join(parts, ","));
}

class Views : public Source {
 public:
  Views(std::string name, std::map<std::string, TensorView, std::less<>> views, std::shared_ptr<const void> keep)
      : name_(std::move(name)), views_(std::move(views)), keep_(std::move(keep)) {
    for (const auto& [key, view] : views_) tensors_[key] = {view.dtype, view.shape};
  }
  std::string name() const override { return name_; }
  const std::map<std::string, TensorInfo, std::less<>>& tensors() const override { return tensors_; }

  void read(std::string_view key, const Box& box, void* out) const override {
    const auto& shape = info(key).shape;
    bool inside = box.size() == shape.size();
    for (std::size_t d = 0; inside && d < box.size(); ++d) inside = 0 <= box[d].lo && box[d].lo <= box[d].hi && box[d].hi <= shape[d];
    require(inside, "[weights] expected a part of the shape {} of {} in {} but got {}", comfytp::to_string(shape), in_quotes(key), name_,
            to_string(box));
    const auto& view = views_.find(key)->second;
    copy(part_of(view, box), TensorView::dense(out, view.dtype, shape_of(box)));
  }

 private:
  std::string name_;
  std::map<std::string, TensorView, std::less<>> views_;
  std::map<std::string, TensorInfo, std::less<>> tensors_;
  std::shared_ptr<const void> keep_;
};

class Renamed : public Source {
 public:
  Renamed(std::shared_ptr<const Source> source, std::map<std::string, std::string, std::less<>> names)
      : source_(std::move(source)), names_(std::move(names)) {
    for (const auto& [key, old] : names_) tensors_[key] = source_->info(old);
  }
  std::string name() const override { return source_->name(); }
  const std::map<std::string, TensorInfo, std::less<>>& tensors() const override { return tensors_; }

  void read(std::string_view key, const Box& box, void* out) const override {
    info(key);
    source_->read(names_.find(key)->second, box, out);
  }

 private:
  std::shared_ptr<const Source> source_;
  std::map<std::string, std::string, std::less<>> names_;
  std::map<std::string, TensorInfo, std::less<>> tensors_;
};

}  // namespace

const TensorInfo& Source::info(std::string_view key) const {
  const auto found = tensors().find(key);
  require(found != tensors().end(), "[weights] expected a tensor {} in {} but there is none", in_quotes(key), name());
  return found->second;
}

std::string in_quotes(std::string_view key) {
  constexpr std::size_t kLongest = 160;
  std::string text = "'";
  for (const char c : key.substr(0, kLongest)) text += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
  return text + (key.size() > kLongest ? "…'" : "'");
}

std::shared_ptr<Source> from_views(std::string name, std::map<std::string, TensorView, std::less<>> views,
                                   std::shared_ptr<const void> keep) {
  return std::make_shared<Views>(std::move(name), std::move(views), std::move(keep));
}

std::shared_ptr<Source> renamed(std::shared_ptr<const Source> source, std::map<std::string, std::string, std::less<>> names) {
  return std::make_shared<Renamed>(std::move(source), std::move(names));
}

}  // namespace comfytp::weights

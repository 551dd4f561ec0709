// A generator that `fastcm export MODEL --aot OUT.pt2` wrote, for C++ programs that link the version of torch that made it.
//
// A package checks nothing by itself: given a tensor of another shape or type it reads memory that is not its own. This wrapper compares
// every input with what the package states of itself, and throws std::invalid_argument with one line. The package is a program: load only
// files that you trust.

#pragma once

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastcm {

// An input or the output: its name, type, and shape without the batch.
struct Value {
  std::string name;
  at::ScalarType type;
  std::vector<std::int64_t> shape;
};

class Generator {
 public:
  explicit Generator(const std::string& path) : loader_(path) {
    const auto stated = loader_.get_metadata();
    for (const char* key : {"fastcm.inputs", "fastcm.output", "fastcm.batch"}) {
      if (stated.count(key) == 0) throw std::invalid_argument("not a package of fastcm export --aot: " + path + " lacks " + key);
    }
    std::stringstream lines(stated.at("fastcm.inputs"));
    for (std::string line; std::getline(lines, line, ';');) inputs_.push_back(parse(line));
    output_ = parse(stated.at("fastcm.output"));
    batch_ = std::stoll(stated.at("fastcm.batch"));
  }

  // In the order in which operator() takes them.
  const std::vector<Value>& inputs() const { return inputs_; }
  const Value& output() const { return output_; }

  // Tensors [batch, shape...] on the CPU in the order of inputs() -> images [batch, shape...].
  at::Tensor operator()(std::vector<at::Tensor> tensors) {
    if (tensors.size() != inputs_.size()) {
      throw std::invalid_argument("wrong number of inputs: " + std::to_string(tensors.size()) + ", not " + std::to_string(inputs_.size()));
    }
    const std::int64_t batch = tensors[0].defined() && tensors[0].dim() > 0 ? tensors[0].size(0) : 0;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      check(inputs_[i], tensors[i], batch);
      tensors[i] = tensors[i].contiguous();
    }
    at::InferenceMode guard;
    return loader_.run(tensors)[0];
  }

 private:
  // "noise float32 1 8 8"
  static Value parse(const std::string& line) {
    std::stringstream words(line);
    Value value;
    std::string type;
    words >> value.name >> type;
    value.type = type == "int64" ? at::kLong : type == "uint8" ? at::kByte : at::kFloat;
    for (std::int64_t size; words >> size;) value.shape.push_back(size);
    return value;
  }

  void check(const Value& wanted, const at::Tensor& tensor, std::int64_t batch) const {
    std::vector<std::int64_t> shape{batch_ > 0 ? batch_ : batch};
    shape.insert(shape.end(), wanted.shape.begin(), wanted.shape.end());
    std::stringstream fault;
    if (!tensor.defined() || !tensor.device().is_cpu()) {
      fault << "input " << wanted.name << " is not a tensor on the CPU";
    } else if (tensor.scalar_type() != wanted.type) {
      fault << "wrong type of input " << wanted.name << ": " << tensor.scalar_type() << ", not " << wanted.type;
    } else if (batch == 0 || tensor.sizes() != at::IntArrayRef(shape)) {
      fault << "wrong shape of input " << wanted.name << ": " << tensor.sizes() << ", not " << at::IntArrayRef(shape);
    } else {
      return;
    }
    throw std::invalid_argument(fault.str());
  }

  torch::inductor::AOTIModelPackageLoader loader_;
  std::vector<Value> inputs_;
  Value output_;
  std::int64_t batch_ = 0;
};

}  // namespace fastcm

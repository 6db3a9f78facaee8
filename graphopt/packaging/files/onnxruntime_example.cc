// example [-t THREADS] [-o FOLDER] MODEL.onnx INPUT.npy...: run a model once in ONNX Runtime on the arrays given, in the
// order of its inputs; every output goes to FOLDER/NAME.npy. Dimensions that the model leaves open are 1.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "npy.h"

namespace {

struct Kind {
  ONNXTensorElementDataType type;
  const char* dtype;
  size_t bytes;
};
constexpr Kind kKinds[] = {
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "float32", 4},   {ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, "float64", 8},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, "float16", 2}, {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, "int8", 1},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16, "int16", 2},     {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, "int32", 4},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, "int64", 8},     {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, "uint8", 1},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16, "uint16", 2},   {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32, "uint32", 4},
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64, "uint64", 8},   {ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, "bool", 1},
};

const Kind& KindOf(ONNXTensorElementDataType type) {
  for (const Kind& each : kKinds) {
    if (each.type == type) return each;
  }
  throw std::runtime_error("an element type of the model has no spelling in .npy files");
}

size_t Count(const std::vector<int64_t>& shape) {
  size_t product = 1;
  for (int64_t length : shape) product *= static_cast<size_t>(length);
  return product;
}

// An input of the model; a dimension that the model leaves open is 1.
Ort::Value Read(const std::string& file, const Ort::TypeInfo& info) {
  const auto wanted = info.GetTensorTypeAndShapeInfo();
  const Kind& kind = KindOf(wanted.GetElementType());
  std::vector<int64_t> shape = wanted.GetShape();
  std::replace_if(shape.begin(), shape.end(), [](int64_t length) { return length < 0; }, 1);
  Ort::AllocatorWithDefaultOptions allocator;
  Ort::Value value = Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), kind.type);
  char error[1024];
  if (npy_read(file.c_str(), kind.dtype, shape.data(), static_cast<int>(shape.size()), value.GetTensorMutableRawData(),
               Count(shape) * kind.bytes, error, sizeof error)) {
    throw std::runtime_error(error);
  }
  return value;
}

void Write(const std::string& folder, std::string name, const Ort::Value& value) {
  const auto info = value.GetTensorTypeAndShapeInfo();
  const Kind& kind = KindOf(info.GetElementType());
  const std::vector<int64_t> shape = info.GetShape();
  std::replace(name.begin(), name.end(), '/', '_');
  char error[1024];
  if (npy_write((folder + "/" + name + ".npy").c_str(), kind.dtype, shape.data(), static_cast<int>(shape.size()),
                value.GetTensorRawData(), Count(shape) * kind.bytes, error, sizeof error)) {
    throw std::runtime_error(error);
  }
}

void Run(const std::string& model, const std::vector<std::string>& files, const std::string& folder, int threads) {
  Ort::Env environment(ORT_LOGGING_LEVEL_ERROR, "example");
  Ort::SessionOptions options;
  options.SetInterOpNumThreads(1);
  options.SetIntraOpNumThreads(threads);
  Ort::Session session(environment, model.c_str(), options);
  if (files.size() != session.GetInputCount()) {
    throw std::runtime_error("the model takes " + std::to_string(session.GetInputCount()) + " inputs, " +
                             std::to_string(files.size()) + " files were given");
  }
  Ort::AllocatorWithDefaultOptions allocator;
  std::vector<std::string> inputs, outputs;
  std::vector<Ort::Value> values;
  for (size_t i = 0; i < files.size(); ++i) {
    inputs.push_back(session.GetInputNameAllocated(i, allocator).get());
    values.push_back(Read(files[i], session.GetInputTypeInfo(i)));
  }
  for (size_t i = 0; i < session.GetOutputCount(); ++i) {
    outputs.push_back(session.GetOutputNameAllocated(i, allocator).get());
  }
  std::vector<const char*> input_names, output_names;
  for (const std::string& each : inputs) input_names.push_back(each.c_str());
  for (const std::string& each : outputs) output_names.push_back(each.c_str());
  const std::vector<Ort::Value> found = session.Run(Ort::RunOptions(), input_names.data(), values.data(), values.size(),
                                                    output_names.data(), output_names.size());
  for (size_t i = 0; i < found.size(); ++i) Write(folder, outputs[i], found[i]);
}

}  // namespace

int main(int count, char** arguments) {
  std::string folder = ".";
  std::vector<std::string> given;
  int threads = 0;
  for (int i = 1; i < count; ++i) {
    const std::string word = arguments[i];
    if (word == "-o" && i + 1 < count) {
      folder = arguments[++i];
    } else if (word == "-t" && i + 1 < count) {
      threads = std::atoi(arguments[++i]);
    } else {
      given.push_back(word);
    }
  }
  if (given.size() < 2) {
    std::fprintf(stderr, "usage: example [-t THREADS] [-o FOLDER] MODEL.onnx INPUT.npy...\n");
    return 2;
  }
  try {
    Run(given[0], {given.begin() + 1, given.end()}, folder, threads);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}

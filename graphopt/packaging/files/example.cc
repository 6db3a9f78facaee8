// example [-t THREADS] [-o FOLDER] PACKAGE INPUT.npy...: run a packed model once on the arrays given, in the order of its
// inputs; every output goes to FOLDER/NAME.npy. Without arrays it says what the model takes and gives.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

#include "graphopt/runner.h"
#include "npy.h"

namespace {

void Say(const char* what, const std::vector<graphopt::Tensor>& tensors) {
  for (const graphopt::Tensor& each : tensors) {
    char shape[512];
    npy_shape(each.shape.data(), static_cast<int>(each.shape.size()), shape, sizeof shape);
    std::printf("%s %s: %s%s\n", what, each.name.c_str(), each.dtype.c_str(), shape);
  }
}

void Run(const std::string& package, const std::vector<std::string>& files, const std::string& folder, int threads) {
  graphopt::Runner model(package, threads);
  char error[1024];
  if (files.empty()) {
    Say("input", model.inputs());
    Say("output", model.outputs());
    return;
  }
  if (files.size() != model.inputs().size()) {
    throw graphopt::Error("the model takes " + std::to_string(model.inputs().size()) + " inputs, " +
                          std::to_string(files.size()) + " files were given");
  }
  for (size_t i = 0; i < files.size(); ++i) {
    const graphopt::Tensor& each = model.inputs()[i];
    if (npy_read(files[i].c_str(), each.dtype.c_str(), each.shape.data(), static_cast<int>(each.shape.size()),
                 model.input(i), each.bytes(), error, sizeof error)) {
      throw graphopt::Error(error);
    }
  }
  model.run();
  for (size_t i = 0; i < model.outputs().size(); ++i) {
    const graphopt::Tensor& each = model.outputs()[i];
    std::string name = each.name;
    std::replace(name.begin(), name.end(), '/', '_');
    if (npy_write((folder + "/" + name + ".npy").c_str(), each.dtype.c_str(), each.shape.data(),
                  static_cast<int>(each.shape.size()), model.output(i), each.bytes(), error, sizeof error)) {
      throw graphopt::Error(error);
    }
  }
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
  if (given.empty()) {
    std::fprintf(stderr, "usage: example [-t THREADS] [-o FOLDER] PACKAGE INPUT.npy...\n");
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

// Runs a compiled model under QEMU's instruction counter (instruction_counter.c): counted_run LIBRARY INPUTS OUTPUTS
//
// INPUTS is a file with one line an input: DLPack's type code, its bits, the number of dimensions, the dimensions, and the
// file that holds the numbers. The outputs' bytes are written to OUTPUTS.0, OUTPUTS.1, .... The marks around nothing, which
// say what marking itself costs, come before those around an inference, and two inferences that are not counted before both:
// the first finds memory, the second is what all others are like.

#include <sys/syscall.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;

namespace {

constexpr long kMark = 0x67726f70;
constexpr size_t kAlignment = 64;
enum What : long { kStop = 0, kStart = 1, kLoaded = 2 };

void Mark(What what, uint64_t address = 0) { syscall(SYS_getpriority, kMark, static_cast<long>(what), address); }

struct Allocator {
  void AllocData(DLTensor* tensor) {
    size_t size = (ffi::GetDataSize(*tensor) + kAlignment - 1) / kAlignment * kAlignment;
    tensor->data = aligned_alloc(kAlignment, size ? size : kAlignment);
  }
  void FreeData(DLTensor* tensor) { free(tensor->data); }
};

// Where the dynamic linker put the library: the lowest address of its mappings.
uint64_t BaseOf(const std::string& library) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.size() >= library.size() && line.compare(line.size() - library.size(), library.size(), library) == 0) {
      return std::stoull(line, nullptr, 16);
    }
  }
  throw std::runtime_error(library + " is not mapped");
}

std::vector<ffi::Tensor> ReadInputs(const char* path) {
  std::vector<ffi::Tensor> found;
  std::ifstream list(path);
  for (int code, bits, ndim; list >> code >> bits >> ndim;) {
    std::vector<int64_t> shape(static_cast<size_t>(ndim));
    for (int64_t& each : shape) list >> each;
    std::string file;
    list >> file;
    DLDataType type{static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
    found.push_back(
        ffi::Tensor::FromNDAlloc(Allocator(), ffi::ShapeView(shape.data(), shape.size()), type, DLDevice{kDLCPU, 0}));
    std::ifstream data(file, std::ios::binary);
    auto size = static_cast<std::streamsize>(ffi::GetDataSize(*found.back().GetDLTensorPtr()));
    if (!data.read(static_cast<char*>(found.back().data_ptr()), size)) throw std::runtime_error(file + " is short");
  }
  return found;
}

void Write(const std::string& path, const ffi::Tensor& tensor) {
  std::ofstream file(path, std::ios::binary);
  auto size = static_cast<std::streamsize>(ffi::GetDataSize(*tensor.GetDLTensorPtr()));
  if (!file.write(static_cast<const char*>(tensor.data_ptr()), size)) throw std::runtime_error(path + " is not written");
}

void Run(const std::string& library, const char* inputs, const std::string& outputs) {
  constexpr int kPooled = 2;  // memory of a run is kept for the next
  ffi::Module loaded = ffi::Module::LoadFromFile(ffi::String(library));
  Mark(kLoaded, BaseOf(library));
  ffi::Module machine = loaded->GetFunction("vm_load_executable", true).value()().cast<ffi::Module>();
  machine->GetFunction("vm_initialization").value()(static_cast<int>(kDLCPU), 0, kPooled);
  ffi::Function main = machine->GetFunction("main").value();
  std::vector<ffi::Tensor> tensors = ReadInputs(inputs);
  std::vector<ffi::AnyView> arguments(tensors.begin(), tensors.end());
  ffi::Any result;
  auto infer = [&] { main.CallPacked(arguments.data(), static_cast<int32_t>(arguments.size()), &result); };
  infer();
  infer();
  Mark(kStart);
  Mark(kStop);
  Mark(kStart);
  infer();
  Mark(kStop);
  if (auto one = result.as<ffi::Tensor>()) {
    Write(outputs + ".0", *one);
    return;
  }
  auto several = result.cast<ffi::Array<ffi::Tensor>>();
  for (size_t i = 0; i < several.size(); ++i) Write(outputs + "." + std::to_string(i), several[i]);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) {
    fprintf(stderr, "usage: counted_run LIBRARY INPUTS OUTPUTS\n");
    return 2;
  }
  try {
    Run(arguments[1], arguments[2], arguments[3]);
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}

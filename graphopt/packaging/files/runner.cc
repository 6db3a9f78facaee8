// graphopt/runner.h on TVM's runtime.

#include "graphopt/runner.h"

#include <sched.h>
#include <sys/stat.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <optional>
#include <sstream>
#include <utility>

#include "graphopt/processor.h"

namespace ffi = tvm::ffi;

namespace graphopt {
namespace {

constexpr size_t kAlignment = 64;  // compiled code loads whole vectors from the start of its arguments
constexpr int64_t kFormat = 1;     // of package.json
constexpr int kFastCores = 1;      // a mode of runtime.config_threadpool
constexpr int kPooled = 2;         // an allocator of vm_initialization: memory of a run serves the next

struct Kind {
  const char* name;
  DLDataType type;
};
constexpr Kind kKinds[] = {
    {"float32", {kDLFloat, 32, 1}}, {"float64", {kDLFloat, 64, 1}}, {"float16", {kDLFloat, 16, 1}},
    {"int8", {kDLInt, 8, 1}},       {"int16", {kDLInt, 16, 1}},     {"int32", {kDLInt, 32, 1}},
    {"int64", {kDLInt, 64, 1}},     {"uint8", {kDLUInt, 8, 1}},     {"uint16", {kDLUInt, 16, 1}},
    {"uint32", {kDLUInt, 32, 1}},   {"uint64", {kDLUInt, 64, 1}},   {"bool", {kDLBool, 8, 1}},
};

DLDataType TypeOf(const std::string& name) {
  for (const Kind& each : kKinds) {
    if (name == each.name) return each.type;
  }
  throw Error("the element type " + name + " is not known to this runner");
}

struct AlignedMemory {
  void AllocData(DLTensor* tensor) {
    size_t bytes = (ffi::GetDataSize(*tensor) + kAlignment - 1) / kAlignment * kAlignment;
    tensor->data = aligned_alloc(kAlignment, std::max(bytes, kAlignment));
    if (tensor->data == nullptr) throw Error("out of memory");
    std::memset(tensor->data, 0, std::max(bytes, kAlignment));
  }
  void FreeData(DLTensor* tensor) { free(tensor->data); }
};

// What TVM's errors come down to: they carry a trace.
std::string LastLine(const std::exception& error) {
  std::string text = error.what();
  text.erase(text.find_last_not_of(" \n\t") + 1);
  return text.substr(text.find_last_of('\n') + 1);
}

std::string ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Error(path + " cannot be read: is this a folder that `graphopt package` wrote?");
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// One of the libraries of a package: the same model, for different processors.
struct Library {
  std::string file, mcpu;
  std::vector<std::string> features;
  bool tiles = false;
  int64_t bytes = 0;

  std::string Missing() const {
    std::string missing;
    for (const std::string& each : features) {
      if (!graphopt_processor_has(each.c_str())) missing += (missing.empty() ? "" : ", ") + each;
    }
    if (missing.empty() && tiles && !graphopt_allow_tiles()) missing = "AMX tile registers that the system lets it use";
    return missing;
  }
};

struct Description {
  std::string arch;
  std::vector<Library> libraries;
  std::vector<Tensor> inputs, outputs;
};

std::string Text(const ffi::json::Object& object, const char* key) {
  return std::string(object.at(ffi::String(key)).cast<ffi::String>());
}

int64_t Number(const ffi::json::Object& object, const char* key) {
  return object.at(ffi::String(key)).cast<int64_t>();
}

std::vector<ffi::json::Object> Objects(const ffi::json::Object& object, const char* key) {
  std::vector<ffi::json::Object> found;
  for (const ffi::Any& each : object.at(ffi::String(key)).cast<ffi::json::Array>()) {
    found.push_back(each.cast<ffi::json::Object>());
  }
  return found;
}

std::vector<Tensor> Tensors(const ffi::json::Object& object, const char* key) {
  std::vector<Tensor> found;
  for (const ffi::json::Object& each : Objects(object, key)) {
    Tensor tensor{Text(each, "name"), Text(each, "dtype"), {}};
    for (const ffi::Any& length : each.at(ffi::String("shape")).cast<ffi::json::Array>()) {
      tensor.shape.push_back(length.cast<int64_t>());
    }
    TypeOf(tensor.dtype);  // known, or an error
    found.push_back(std::move(tensor));
  }
  return found;
}

Description Describe(const ffi::json::Object& object, const std::string& path) {
  int64_t format = Number(object, "format");
  if (format != kFormat) {
    throw Error(path + " has format " + std::to_string(format) + ", this runner reads " + std::to_string(kFormat));
  }
  Description found{Text(object, "arch"), {}, Tensors(object, "inputs"), Tensors(object, "outputs")};
  for (const ffi::json::Object& each : Objects(object, "libraries")) {
    Library library{Text(each, "file"), Text(each, "mcpu"), {}, each.at(ffi::String("tiles")).cast<bool>(),
                    Number(each, "bytes")};
    for (const ffi::Any& feature : each.at(ffi::String("features")).cast<ffi::json::Array>()) {
      library.features.push_back(std::string(feature.cast<ffi::String>()));
    }
    found.libraries.push_back(std::move(library));
  }
  return found;
}

Description ReadDescription(const std::string& folder) {
  const std::string path = folder + "/package.json";
  ffi::String complaint;
  ffi::json::Value parsed = ffi::json::Parse(ffi::String(ReadText(path)), &complaint);
  if (!complaint.empty()) throw Error(path + " is damaged: " + std::string(complaint));
  try {
    return Describe(parsed.cast<ffi::json::Object>(), path);
  } catch (const ffi::Error& error) {
    throw Error(path + " is damaged: " + LastLine(error));
  }
}

// The first library whose every instruction this processor has. Nothing of a library runs before that is known.
const Library& Choose(const Description& described, const std::string& folder) {
  if (described.arch != GRAPHOPT_ARCH) {
    throw Error(folder + " was built for " + described.arch + ", this machine is " GRAPHOPT_ARCH);
  }
  std::string refused;
  for (const Library& each : described.libraries) {
    std::string missing = each.Missing();
    if (missing.empty()) return each;
    refused += (refused.empty() ? "" : "; ") + each.file + " is for " + each.mcpu + " and needs " + missing;
  }
  throw Error("this processor lacks what " + folder + " was built for: " + refused);
}

// A library that is cut short would end the process when it is mapped.
void CheckWhole(const std::string& path, int64_t bytes) {
  struct stat found {};
  if (stat(path.c_str(), &found) != 0) throw Error(path + " is missing");
  if (found.st_size != bytes) {
    throw Error(path + " is damaged: it has " + std::to_string(found.st_size) + " bytes instead of " +
                std::to_string(bytes));
  }
}

int Processors() {
  cpu_set_t allowed;
  return sched_getaffinity(0, sizeof allowed, &allowed) == 0 ? std::max(CPU_COUNT(&allowed), 1) : 1;
}

// TVM reads these when a thread first uses its pool; by itself it takes half of the processors, pins them, and keeps
// them busy for up to 100 ms after every run.
void PreparePool(int threads) {
  setenv("TVM_BIND_THREADS", "0", 0);
  setenv("TVM_THREAD_POOL_SPIN_COUNT", "2000", 0);
  const char* asked = getenv("TVM_NUM_THREADS");
  int wanted = std::max(threads, Processors());
  if (asked == nullptr || atoi(asked) < wanted) setenv("TVM_NUM_THREADS", std::to_string(wanted).c_str(), 1);
}

size_t Find(const std::vector<Tensor>& tensors, const std::string& name, const char* what) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].name == name) return i;
  }
  throw Error("the model has no " + std::string(what) + " '" + name + "'");
}

thread_local int pool_threads = 0;  // what the calling thread's pool is set to; TVM has one pool a thread

}  // namespace

size_t Tensor::count() const {
  size_t product = 1;
  for (int64_t length : shape) product *= static_cast<size_t>(length);
  return product;
}

size_t Tensor::bytes() const { return count() * static_cast<size_t>(TypeOf(dtype).bits) / 8; }

struct Runner::State {
  Description described;
  std::string library;
  int threads;
  std::optional<ffi::Module> loaded, machine;
  ffi::Function main;
  std::vector<ffi::Tensor> inputs, outputs;

  State(const std::string& folder, int asked) : described(ReadDescription(folder)) {
    if (asked < 0) throw Error("threads must be 0 (all) or more, not " + std::to_string(asked));
    threads = asked > 0 ? asked : Processors();
    const Library& chosen = Choose(described, folder);
    library = chosen.file;
    const std::string path = folder + "/" + library;
    CheckWhole(path, chosen.bytes);
    PreparePool(threads);
    // A name without a folder would be looked for where the system's libraries are.
    loaded = ffi::Module::LoadFromFile(ffi::String(path[0] == '/' ? path : "./" + path));
    machine = (*loaded)->GetFunction("vm_load_executable", true).value()().cast<ffi::Module>();
    (*machine)->GetFunction("vm_initialization").value()(static_cast<int>(kDLCPU), 0, kPooled);
    main = (*machine)->GetFunction("main").value();
    for (const Tensor& each : described.inputs) {
      inputs.push_back(ffi::Tensor::FromNDAlloc(AlignedMemory(), ffi::ShapeView(each.shape.data(), each.shape.size()),
                                                TypeOf(each.dtype), DLDevice{kDLCPU, 0}));
    }
  }

  void Run() {
    if (pool_threads != threads) {
      ffi::Function::GetGlobalRequired("runtime.config_threadpool")(kFastCores, threads);
      pool_threads = threads;
    }
    std::vector<ffi::AnyView> arguments(inputs.begin(), inputs.end());
    ffi::Any result;
    main.CallPacked(arguments.data(), static_cast<int32_t>(arguments.size()), &result);
    outputs.clear();
    if (auto one = result.as<ffi::Tensor>()) {
      outputs.push_back(*one);
    } else {
      for (const ffi::Tensor& each : result.cast<ffi::Array<ffi::Tensor>>()) outputs.push_back(each);
    }
  }
};

Runner::Runner(const std::string& package, int threads) {
  try {
    state_ = std::make_unique<State>(package, threads);
  } catch (const ffi::Error& error) {
    throw Error(package + " cannot be loaded: " + LastLine(error));
  }
}

Runner::~Runner() = default;
Runner::Runner(Runner&&) noexcept = default;
Runner& Runner::operator=(Runner&&) noexcept = default;

const std::vector<Tensor>& Runner::inputs() const { return state_->described.inputs; }
const std::vector<Tensor>& Runner::outputs() const { return state_->described.outputs; }
int Runner::threads() const { return state_->threads; }
const std::string& Runner::library() const { return state_->library; }

void* Runner::input(size_t index) {
  if (index >= state_->inputs.size()) throw Error("the model has no input " + std::to_string(index));
  return state_->inputs[index].data_ptr();
}

void* Runner::input(const std::string& name) { return input(Find(inputs(), name, "input")); }

void Runner::run() {
  try {
    state_->Run();
  } catch (const ffi::Error& error) {
    throw Error("the model failed: " + LastLine(error));
  }
}

const void* Runner::output(size_t index) const {
  if (index >= outputs().size()) throw Error("the model has no output " + std::to_string(index));
  if (state_->outputs.empty()) throw Error("there are no outputs before run()");
  const DLTensor* tensor = state_->outputs[index].GetDLTensorPtr();
  return static_cast<const char*>(tensor->data) + tensor->byte_offset;
}

const void* Runner::output(const std::string& name) const { return output(Find(outputs(), name, "output")); }

}  // namespace graphopt

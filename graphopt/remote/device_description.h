// What machine this is, as JSON: what `graphopt.remote.device` reads.
//
// Features are in /proc/cpuinfo's spelling; on ARM they come from the auxiliary vector, which an emulator fills in for
// the processor that it emulates. Cores are "IMPLEMENTER:PART" of ARM's MIDR register, or x86's model names. GPUs are
// what NVIDIA's driver says; asking starts it, and a process that has started it must not fork.

#pragma once

#include <dlfcn.h>
#include <sys/auxv.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#ifndef GRAPHOPT_TVM
#error "GRAPHOPT_TVM and GRAPHOPT_TVM_FFI name the versions of the libraries this is linked with"
#endif

inline std::string Quoted(const std::string& text) {
  std::string quoted = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) quoted += c;
  }
  return quoted + "\"";
}

inline std::string List(const std::vector<std::string>& texts) {
  std::string joined;
  for (const std::string& text : texts) joined += (joined.empty() ? "" : ", ") + Quoted(text);
  return "[" + joined + "]";
}

// The values behind every `key` of a file of "key : value" lines.
inline std::vector<std::string> Values(const char* file, const std::string& key) {
  std::ifstream lines(file);
  std::vector<std::string> found;
  for (std::string line; std::getline(lines, line);) {
    size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    std::string name = line.substr(0, line.find_last_not_of(" \t", colon - 1) + 1);
    size_t start = line.find_first_not_of(" \t", colon + 1);
    if (name == key) found.push_back(start == std::string::npos ? "" : line.substr(start));
  }
  return found;
}

// In bytes; 0 where the system does not say.
inline unsigned long long Memory(const std::string& key) {
  std::vector<std::string> found = Values("/proc/meminfo", key);
  return found.empty() ? 0 : strtoull(found[0].c_str(), nullptr, 10) * 1024;
}

inline std::string BoardModel() {
  std::ifstream file("/sys/firmware/devicetree/base/model");
  std::string model;
  std::getline(file, model, '\0');
  return model;
}

#ifdef __aarch64__

inline std::string Part(unsigned long midr) {
  char text[16];
  snprintf(text, sizeof text, "0x%02lx:0x%03lx", midr >> 24 & 0xff, midr >> 4 & 0xfff);
  return text;
}

inline std::vector<std::string> Features() {
  struct Bit {
    int vector, bit;
    const char* name;
  };
  static const Bit bits[] = {{AT_HWCAP, 1, "asimd"},    {AT_HWCAP, 8, "atomics"}, {AT_HWCAP, 9, "fphp"},
                             {AT_HWCAP, 10, "asimdhp"}, {AT_HWCAP, 20, "asimddp"}, {AT_HWCAP, 22, "sve"},
                             {AT_HWCAP2, 1, "sve2"},    {AT_HWCAP2, 13, "i8mm"},   {AT_HWCAP2, 14, "bf16"}};
  std::vector<std::string> found;
  for (const Bit& each : bits) {
    if (getauxval(static_cast<unsigned long>(each.vector)) >> each.bit & 1) found.push_back(each.name);
  }
  return found;
}

inline std::vector<std::string> Cores() {
  std::vector<std::string> found;
  for (int cpu = 0;; cpu++) {  // the kernel says it of every core: they may differ
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/regs/identification/midr_el1");
    std::string text;
    if (!(file >> text)) break;
    found.push_back(Part(strtoul(text.c_str(), nullptr, 16)));
  }
  constexpr unsigned long kCpuid = 1ul << 11;  // the register may be read from here
  if (found.empty() && (getauxval(AT_HWCAP) & kCpuid)) {
    unsigned long midr = 0;
    asm("mrs %0, MIDR_EL1" : "=r"(midr));
    found.assign(static_cast<size_t>(sysconf(_SC_NPROCESSORS_ONLN)), Part(midr));
  }
  return found;
}

#else

inline std::vector<std::string> Features() {
  std::vector<std::string> found, lines = Values("/proc/cpuinfo", "flags");
  std::istringstream words(lines.empty() ? "" : lines[0]);
  for (std::string word; words >> word;) found.push_back(word);
  return found;
}

inline std::vector<std::string> Cores() { return Values("/proc/cpuinfo", "model name"); }

#endif

// A JSON object for each; none where there is no driver.
inline std::string Gpus() {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  if (driver == nullptr) return "[]";
  auto init = reinterpret_cast<int (*)(unsigned)>(dlsym(driver, "cuInit"));
  auto count_of = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDeviceGetCount"));
  auto name_of = reinterpret_cast<int (*)(char*, int, int)>(dlsym(driver, "cuDeviceGetName"));
  auto attribute_of = reinterpret_cast<int (*)(int*, int, int)>(dlsym(driver, "cuDeviceGetAttribute"));
  auto memory_of = reinterpret_cast<int (*)(size_t*, int)>(dlsym(driver, "cuDeviceTotalMem_v2"));
  int count = 0;
  if (!init || !count_of || !name_of || !attribute_of || !memory_of || init(0) || count_of(&count)) return "[]";
  std::ostringstream json;
  for (int gpu = 0; gpu < count; gpu++) {
    constexpr int kMajor = 75, kMinor = 76, kMultiprocessors = 16;  // CU_DEVICE_ATTRIBUTE_...
    char name[256] = "";
    int major = 0, minor = 0, multiprocessors = 0;
    size_t memory = 0;
    name_of(name, sizeof name, gpu);
    attribute_of(&major, kMajor, gpu);
    attribute_of(&minor, kMinor, gpu);
    attribute_of(&multiprocessors, kMultiprocessors, gpu);
    if (memory_of(&memory, gpu)) memory = 0;
    json << (gpu ? ", " : "") << "{\"name\": " << Quoted(name) << ", \"arch\": \"sm_" << major << minor
         << "\", \"memory_bytes\": " << memory << ", \"multiprocessors\": " << multiprocessors << "}";
  }
  return "[" + json.str() + "]";
}

inline std::string DescribeDevice() {
  utsname system{};
  uname(&system);
  const char* emulated = getenv("GRAPHOPT_EMULATED");
  std::ostringstream json;
  json << "{\"arch\": " << Quoted(system.machine) << ", \"cores\": " << List(Cores())
       << ", \"features\": " << List(Features()) << ", \"board\": " << Quoted(BoardModel())
       << ", \"system\": " << Quoted(std::string(system.sysname) + " " + system.release)
       << ", \"memory_bytes\": " << Memory("MemTotal") << ", \"available_bytes\": " << Memory("MemAvailable")
       << ", \"gpus\": " << Gpus() << ", \"emulated\": " << Quoted(emulated ? emulated : "") << ", \"tvm\": " << Quoted(GRAPHOPT_TVM)
       << ", \"tvm_ffi\": " << Quoted(GRAPHOPT_TVM_FFI) << "}";
  return json.str();
}

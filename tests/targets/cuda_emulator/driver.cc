// The parts of CUDA's driver (-DDRIVER) and runtime library (-DRUNTIME) that TVM calls, on this machine's memory.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

struct Uint3 {
  unsigned x, y, z;
};

using Work = std::function<void()>;
using Graph = std::vector<Work>;

#ifdef DRIVER
// ---- threads of a block as coroutines -------------------------------------------------------------------------------
extern "C" {
Uint3 __emu_thread, __emu_block, __emu_block_dim, __emu_grid_dim;
unsigned char* __emu_dynamic_shared;  // of the block that runs
Graph* __emu_recording = nullptr;
void __emu_switch(void** save, void* to);
}
asm(R"(
.globl __emu_switch
__emu_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

enum State { READY, AT_BLOCK, AT_CLUSTER, AT_WARP, DONE };
constexpr size_t STACK = 512 << 10;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;  // zeros up to 16
};

struct Fiber {
  char* stack;
  void* sp;
  State state;
  Uint3 index, block;
  unsigned char* shared;
  std::vector<std::vector<Copy>> copies;  // groups that nobody waited for, and the one that is being asked for
};

static std::vector<Fiber> fibers;
static void* scheduler_sp;
static size_t current, block_threads;
static std::vector<unsigned char*> shared_of;  // by block of the cluster
static void (*entry)(void**);
static void** entry_arguments;

static void body() {
  entry(entry_arguments);
  fibers[current].state = DONE;
  __emu_switch(&fibers[current].sp, scheduler_sp);
  abort();
}

static void wait(State state) {
  fibers[current].state = state;
  __emu_switch(&fibers[current].sp, scheduler_sp);
}

extern "C" void __emu_sync_block() { wait(AT_BLOCK); }
extern "C" void __emu_sync_warp() { wait(AT_WARP); }
extern "C" void __emu_sync_cluster() { wait(AT_CLUSTER); }
extern "C" unsigned __emu_linear() { return current % block_threads; }

// What is copied is there only when somebody waited for it.
extern "C" void __emu_copy16(void* to, const void* from, bool inside) {
  if ((size_t)to % 16 || (inside && (size_t)from % 16)) abort();
  fibers[current].copies.back().push_back({to, from, inside ? 16u : 0u});
}
extern "C" void __emu_end_group() { fibers[current].copies.emplace_back(); }
extern "C" void __emu_await(size_t left) {
  auto& groups = fibers[current].copies;
  while (groups.size() > left + 1) {
    for (auto& each : groups.front()) {
      memset(each.to, 0, 16);
      if (each.bytes) memcpy(each.to, each.from, each.bytes);
    }
    groups.erase(groups.begin());
  }
}
extern "C" const void* __emu_shared_of(const void* own, unsigned block) {
  return shared_of[block] + ((const unsigned char*)own - __emu_dynamic_shared);
}

static void start(size_t i, Uint3 index, Uint3 block, unsigned char* shared) {
  Fiber& f = fibers[i];
  if (!f.stack)
    f.stack = (char*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  void** top = (void**)(f.stack + STACK) - 2;
  *top = (void*)body;
  f.sp = top - 6;
  f.state = READY;
  f.index = index;
  f.block = block;
  f.shared = shared;
  f.copies.assign(1, {});
}

static bool release(State state, size_t count) {
  bool alive = false;
  for (size_t k = 0; k < count; k++)
    if (fibers[k].state == state) fibers[k].state = READY, alive = true;
  return alive;
}

// Neighbours along x that are there at the same time.
static void run_cluster(Uint3 first, unsigned blocks) {
  Uint3 d = __emu_block_dim;
  block_threads = (size_t)d.x * d.y * d.z;
  size_t count = block_threads * blocks, i = 0;
  if (fibers.size() < count) fibers.resize(count);
  for (unsigned b = 0; b < blocks; b++)
    for (unsigned z = 0; z < d.z; z++)
      for (unsigned y = 0; y < d.y; y++)
        for (unsigned x = 0; x < d.x; x++) start(i++, {x, y, z}, {first.x + b, first.y, first.z}, shared_of[b]);
  do {
    for (size_t warp = 0; warp < count; warp += 32) {
      size_t end = warp + 32 < count ? warp + 32 : count;
      for (bool again = true; again;) {
        for (current = warp; current < end; current++)
          if (fibers[current].state == READY) {
            __emu_thread = fibers[current].index;
            __emu_block = fibers[current].block;
            __emu_dynamic_shared = fibers[current].shared;
            size_t self = current;
            __emu_switch(&scheduler_sp, fibers[self].sp);
          }
        again = false;
        for (size_t k = warp; k < end; k++)
          if (fibers[k].state == AT_WARP) fibers[k].state = READY, again = true;
      }
    }
  } while (release(AT_BLOCK, count) || release(AT_CLUSTER, count));
}

struct Function {
  void (*call)(void**);
  const unsigned long* sizes;
  bool waits;
};

static void launch(Function* f, Uint3 grid, Uint3 block, unsigned shared, unsigned cluster, void** arguments) {
  __emu_grid_dim = grid;
  __emu_block_dim = block;
  static std::vector<std::vector<unsigned char>> dynamic;
  if (dynamic.size() < cluster) dynamic.resize(cluster);
  shared_of.clear();
  for (unsigned b = 0; b < cluster; b++) {
    dynamic[b].assign(shared + 64, 0xFF);
    shared_of.push_back((unsigned char*)(((size_t)dynamic[b].data() + 63) & ~(size_t)63));
  }
  __emu_dynamic_shared = shared_of[0];
  entry = f->call;
  entry_arguments = arguments;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x += cluster) {
        __emu_block = {x, y, z};
        if (f->waits) {
          run_cluster(__emu_block, cluster);
          continue;
        }
        for (unsigned tz = 0; tz < block.z; tz++)
          for (unsigned ty = 0; ty < block.y; ty++)
            for (unsigned tx = 0; tx < block.x; tx++) {
              __emu_thread = {tx, ty, tz};
              f->call(arguments);
            }
      }
}

struct Attribute {
  int id;
  char padding[4];
  unsigned value[16];
};
constexpr int CLUSTER_DIMENSION = 4;

struct LaunchConfig {
  unsigned gx, gy, gz, bx, by, bz, shared;
  void* stream;
  const Attribute* attributes;
  unsigned count;
};

static unsigned cluster_of(const LaunchConfig* c) {
  for (unsigned i = 0; i < c->count; i++)
    if (c->attributes[i].id == CLUSTER_DIMENSION) return c->attributes[i].value[0];
  return 1;
}

extern "C" {
int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGetName(char* name, int length, int) { return snprintf(name, length, "emulated"), 0; }
int cuDeviceGetAttribute(int* value, int which, int) {
  const char* arch = getenv("GRAPHOPT_EMULATED_ARCH");
  int number = arch ? atoi(arch) : 80;
  *value = which == 75 ? number / 10 : which == 76 ? number % 10 : which == 16 ? 80 : 0;
  return 0;
}
int cuDeviceTotalMem_v2(size_t* bytes, int) {
  const char* memory = getenv("GRAPHOPT_EMULATED_MEMORY");
  return *bytes = memory ? atol(memory) : (size_t)8 << 30, 0;
}
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuGetErrorName(int, const char** text) { return *text = "emulated error", 0; }
int cuGetErrorString(int, const char** text) { return *text = "emulated error", 0; }
int cuTensorMapEncodeTiled() { return 801; }
int cuModuleUnload(void*) { return 0; }

int cuModuleLoadData(void** module, const void* image) {
  const char* bytes = (const char*)image;
  if (memcmp(bytes, "GRAPHEMU", 8)) return 200;
  size_t length;
  memcpy(&length, bytes + 8, 8);
  char path[] = "/tmp/graphopt-emulated-XXXXXX";
  int file = mkstemp(path);
  for (size_t done = 0; done < length;) {
    ssize_t wrote = write(file, bytes + 16 + done, length - done);
    if (wrote <= 0) return 1;
    done += wrote;
  }
  close(file);
  *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!*module) fprintf(stderr, "%s\n", dlerror());
  unlink(path);
  return *module ? 0 : 200;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  std::string text(name);
  void* call = dlsym(module, ("__emu_call_" + text).c_str());
  if (!call) return 500;
  *function = new Function{(void (*)(void**))call, (const unsigned long*)dlsym(module, ("__emu_sizes_" + text).c_str()),
                           *(const int*)dlsym(module, ("__emu_waits_" + text).c_str()) != 0};
  return 0;
}

int cuLaunchKernelEx(const LaunchConfig* c, void* function, void** arguments, void**) {
  Function* f = (Function*)function;
  Uint3 grid{c->gx, c->gy, c->gz}, block{c->bx, c->by, c->bz};
  unsigned shared = c->shared, cluster = cluster_of(c);
  if (grid.x % cluster || cluster > 8) return 1;
  if ((size_t)block.x * block.y * block.z > 1024 || grid.y > 65535 || grid.z > 65535) return 1;
  if (!__emu_recording) {
    launch(f, grid, block, shared, cluster, arguments);
    return 0;
  }
  std::vector<std::vector<unsigned char>> kept;
  for (size_t i = 0; f->sizes[i]; i++) {
    unsigned char* from = (unsigned char*)arguments[i];
    kept.emplace_back(from, from + f->sizes[i]);
  }
  __emu_recording->push_back([=]() mutable {
    std::vector<void*> pointers;
    for (auto& each : kept) pointers.push_back(each.data());
    launch(f, grid, block, shared, cluster, pointers.data());
  });
  return 0;
}
}
#endif

#ifdef RUNTIME
extern "C" {
extern Graph* __emu_recording;

int cudaGetDeviceCount(int* count) { return *count = 1, 0; }
int cudaSetDevice(int) { return 0; }
int cudaGetDevice(int* device) { return *device = 0, 0; }
int cudaDeviceGetAttribute(int* value, int which, int) {
  *value = which == 1 ? 1024 : which == 10 ? 32 : which == 16 ? 80 : which == 75 ? 8 : 49152;
  return 0;
}
int cudaGetDeviceProperties(void* properties, int) { return memset(properties, 0, 512), 0; }
int cudaMalloc(void** address, size_t bytes) {
  if (const char* limit = getenv("GRAPHOPT_EMULATED_ALLOCATION"); limit && bytes > atol(limit)) return 2;
  *address = aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *address ? (memset(*address, 0xFF, bytes), 0) : 2;  // all ones are NaN in every float type
}
int cudaMallocHost(void** address, size_t bytes) { return cudaMalloc(address, bytes); }
int cudaFree(void* address) { return free(address), 0; }
int cudaFreeHost(void* address) { return free(address), 0; }
int cudaMemGetInfo(size_t* free_bytes, size_t* all) { return *free_bytes = *all = (size_t)8 << 30, 0; }
int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, void*) {
  if (__emu_recording)
    __emu_recording->push_back([=] { memcpy(to, from, bytes); });
  else
    memcpy(to, from, bytes);
  return 0;
}
int cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, void*) { return memcpy(to, from, bytes), 0; }
int cudaStreamCreate(void** stream) { return *stream = (void*)1, 0; }
int cudaStreamCreateWithFlags(void** stream, unsigned) { return *stream = (void*)1, 0; }
int cudaStreamDestroy(void*) { return 0; }
int cudaStreamSynchronize(void*) { return __emu_recording ? 900 : 0; }
int cudaStreamWaitEvent(void*, void*, unsigned) { return 0; }
int cudaEventCreate(void** event) { return *event = new timespec, 0; }
int cudaEventDestroy(void* event) { return delete (timespec*)event, 0; }
int cudaEventRecord(void* event, void*) { return clock_gettime(CLOCK_MONOTONIC, (timespec*)event); }
int cudaEventSynchronize(void*) { return 0; }
int cudaEventElapsedTime(float* ms, void* from, void* to) {
  timespec *a = (timespec*)from, *b = (timespec*)to;
  *ms = (b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) * 1e-6;
  return 0;
}
int cudaGetLastError() { return 0; }
int cudaPeekAtLastError() { return 0; }
const char* cudaGetErrorName(int) { return "emulated error"; }
const char* cudaGetErrorString(int) { return "emulated error"; }
int cudaStreamBeginCapture(void*, int) { return __emu_recording = new Graph, 0; }
int cudaStreamEndCapture(void*, void** graph) {
  *graph = __emu_recording;
  __emu_recording = nullptr;
  return 0;
}
int cudaGraphInstantiate(void** made, void* graph, unsigned long long) {
  *made = new Graph(*(Graph*)graph);
  return 0;
}
int cudaGraphLaunch(void* graph, void*) {
  for (auto& each : *(Graph*)graph) each();
  return 0;
}
int cudaGraphDestroy(void* graph) { return delete (Graph*)graph, 0; }
int cudaGraphExecDestroy(void* graph) { return delete (Graph*)graph, 0; }
}
#endif

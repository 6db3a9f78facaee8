// Runs a model in ONNX Runtime under QEMU's instruction counter: onnxruntime_counted MODEL INPUTS OUTPUTS
//
// The same marks around the same things as graphopt/remote/counted_run.cc, whose INPUTS and OUTPUTS these are too. One thread,
// all graph optimizations. The wheels carry the library but no header; its interface is a table of functions whose order
// never changes, so those used are declared here by their number: https://onnxruntime.ai/docs/api/c/struct_ort_api.html

#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef struct {
  const void *const *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)(void);
} ApiBase;

const ApiBase *OrtGetApiBase(void);

enum {
  kGetErrorMessage = 2,
  kCreateEnv = 3,
  kCreateSession = 7,
  kRun = 9,
  kCreateSessionOptions = 10,
  kSetSessionGraphOptimizationLevel = 23,
  kSetIntraOpNumThreads = 24,
  kSessionGetInputCount = 30,
  kSessionGetOutputCount = 31,
  kSessionGetInputName = 36,
  kSessionGetOutputName = 37,
  kCreateTensorWithDataAsOrtValue = 49,
  kGetTensorMutableData = 51,
  kGetTensorElementType = 60,
  kGetTensorShapeElementCount = 64,
  kGetTensorTypeAndShape = 65,
  kCreateCpuMemoryInfo = 69,
  kGetAllocatorWithDefaultOptions = 78,
};
enum { kVersion = 13, kWarnings = 2, kAllOptimizations = 99, kArena = 1, kDefaultMemory = 0, kMost = 64, kAlignment = 64 };

static const void *const *api;

#define CALL(number, ...) Check(((void *(*)(__VA_ARGS__))api[number])

static void Check(void *status) {
  if (status == NULL) return;
  fprintf(stderr, "%s\n", ((const char *(*)(void *))api[kGetErrorMessage])(status));
  exit(1);
}

static void Fail(const char *what) {
  fprintf(stderr, "%s\n", what);
  exit(1);
}

static void Mark(long what) { syscall(SYS_getpriority, 0x67726f70L, what, 0L); }

// ONNX Runtime's element type by DLPack's code and bits; 0 where this program has no use for it.
static int TypeOf(int code, int bits) {
  if (code == 2) return bits == 32 ? 1 : bits == 64 ? 11 : 0;
  if (code == 6) return 9;
  int is_signed = code == 0;
  switch (bits) {
    case 8: return is_signed ? 3 : 2;
    case 16: return is_signed ? 5 : 4;
    case 32: return is_signed ? 6 : 12;
    case 64: return is_signed ? 7 : 13;
  }
  return 0;
}

static size_t BytesOf(int type) {
  switch (type) {
    case 2: case 3: case 9: return 1;
    case 4: case 5: return 2;
    case 1: case 6: case 12: return 4;
    case 7: case 11: case 13: return 8;
  }
  Fail("an output has a type that is not read here");
  return 0;
}

static void *ReadInput(FILE *list, void *memory) {
  int code, bits, ndim;
  int64_t shape[16], count = 1;
  char path[4096];
  if (fscanf(list, "%d %d %d", &code, &bits, &ndim) != 3 || ndim > 16 || TypeOf(code, bits) == 0) Fail("a bad input");
  for (int i = 0; i < ndim; ++i) {
    if (fscanf(list, "%ld", &shape[i]) != 1) Fail("a bad shape");
    count *= shape[i];
  }
  size_t size = (size_t)count * (size_t)bits / 8;
  char *data = aligned_alloc(kAlignment, (size + kAlignment) / kAlignment * kAlignment);
  FILE *file = fscanf(list, "%4095s", path) == 1 ? fopen(path, "rb") : NULL;
  if (data == NULL || file == NULL || fread(data, 1, size, file) != size) Fail("an input is short");
  fclose(file);
  void *tensor;
  CALL(kCreateTensorWithDataAsOrtValue, void *, void *, size_t, const int64_t *, size_t, int, void **)
  (memory, data, size, shape, (size_t)ndim, TypeOf(code, bits), &tensor));
  return tensor;
}

static void WriteOutput(const char *base, size_t index, void *tensor) {
  void *info, *data;
  int type;
  size_t count;
  char path[4096];
  CALL(kGetTensorTypeAndShape, void *, void **)(tensor, &info));
  CALL(kGetTensorElementType, void *, int *)(info, &type));
  CALL(kGetTensorShapeElementCount, void *, size_t *)(info, &count));
  CALL(kGetTensorMutableData, void *, void **)(tensor, &data));
  snprintf(path, sizeof path, "%s.%zu", base, index);
  FILE *file = fopen(path, "wb");
  if (file == NULL || fwrite(data, BytesOf(type), count, file) != count) Fail("an output cannot be written");
  fclose(file);
}

int main(int argc, char **argv) {
  if (argc != 4) Fail("usage: onnxruntime_counted MODEL INPUTS OUTPUTS");
  api = OrtGetApiBase()->GetApi(kVersion);
  void *env, *options, *session, *allocator, *memory;
  size_t input_count, output_count;
  const char *input_names[kMost], *output_names[kMost];
  void *inputs[kMost], *outputs[kMost] = {NULL};
  CALL(kCreateEnv, int, const char *, void **)(kWarnings, "counted", &env));
  CALL(kCreateSessionOptions, void **)(&options));
  CALL(kSetSessionGraphOptimizationLevel, void *, int)(options, kAllOptimizations));
  CALL(kSetIntraOpNumThreads, void *, int)(options, 1));
  CALL(kCreateSession, void *, const char *, void *, void **)(env, argv[1], options, &session));
  CALL(kGetAllocatorWithDefaultOptions, void **)(&allocator));
  CALL(kCreateCpuMemoryInfo, int, int, void **)(kArena, kDefaultMemory, &memory));
  CALL(kSessionGetInputCount, void *, size_t *)(session, &input_count));
  CALL(kSessionGetOutputCount, void *, size_t *)(session, &output_count));
  if (input_count > kMost || output_count > kMost) Fail("the model has too many inputs or outputs");
  FILE *list = fopen(argv[2], "r");
  if (list == NULL) Fail("the list of inputs cannot be read");
  for (size_t i = 0; i < input_count; ++i) {
    CALL(kSessionGetInputName, void *, size_t, void *, const char **)(session, i, allocator, &input_names[i]));
    inputs[i] = ReadInput(list, memory);
  }
  for (size_t i = 0; i < output_count; ++i) {
    CALL(kSessionGetOutputName, void *, size_t, void *, const char **)(session, i, allocator, &output_names[i]));
  }
#define INFER()                                                                                                          \
  CALL(kRun, void *, void *, const char *const *, void *const *, size_t, const char *const *, size_t, void **)            \
  (session, NULL, input_names, inputs, input_count, output_names, output_count, outputs))
  INFER();  // makes the outputs, which later calls write into
  INFER();
  Mark(1);
  Mark(0);
  Mark(1);
  INFER();
  Mark(0);
  for (size_t i = 0; i < output_count; ++i) WriteOutput(argv[3], i, outputs[i]);
  return 0;
}

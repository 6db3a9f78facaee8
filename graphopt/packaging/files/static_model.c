/* model.h: runs the calls of plan.c one after the other. Kernels are TVM's; the little they want of its runtime (errors,
 * scratch memory, a pool of threads) is here. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plan.h"
#include "processor.h"

enum { ALIGNMENT = 64, CPU = 1, TENSOR = 7, SPIN_COUNT = 2000 };

static _Thread_local char error_text[1024];
static unsigned char* arena;
static plan_dltensor* tensors;

const char* graphopt_error(void) { return error_text; }

static int fail(const char* text) {
  snprintf(error_text, sizeof error_text, "%s", text);
  return 1;
}

/* ---- What kernels want of a runtime. ---- */

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  size_t at = (size_t)snprintf(error_text, sizeof error_text, "%s: ", kind);
  int32_t i;
  for (i = 0; i < count && at < sizeof error_text; ++i) {
    at += (size_t)snprintf(error_text + at, sizeof error_text - at, "%s", parts[i] ? parts[i] : "");
  }
}

void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message) {
  TVMFFIErrorSetRaisedFromCStrParts(kind, &message, 1);
}

static void* allocate(int device_type, int device_id, uint64_t bytes, int code, int bits) {
  (void)device_type, (void)device_id, (void)code, (void)bits;
  return aligned_alloc(ALIGNMENT, (bytes / ALIGNMENT + 1) * ALIGNMENT);
}

static int release(int device_type, int device_id, void* memory) {
  (void)device_type, (void)device_id;
  free(memory);
  return 0;
}

typedef struct {
  void* handle;
  int32_t count;
} group;

typedef int (*task)(int index, group* environment, void* data);

/* The pool: worker i of `workers` runs task i+1 of a round; the caller runs task 0. A worker that waits yields for about
 * half a millisecond before it sleeps. */
static struct {
  pthread_mutex_t mutex;
  pthread_cond_t wake;
  pthread_t* threads;
  int workers;
  atomic_uint round;
  atomic_int running, failed;
  int ends;
  task function;
  void* data;
  int count;
} pool = {.mutex = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static void take_part(int index) {
  group environment = {NULL, pool.count};
  if (index < pool.count && pool.function(index, &environment, pool.data) != 0) atomic_store(&pool.failed, 1);
}

static void* work(void* argument) {
  const int index = (int)(intptr_t)argument;
  unsigned seen = 0;
  for (;;) {
    int spins;
    for (spins = 0; spins < SPIN_COUNT && atomic_load(&pool.round) == seen; ++spins) sched_yield();
    if (atomic_load(&pool.round) == seen) {
      pthread_mutex_lock(&pool.mutex);
      while (atomic_load(&pool.round) == seen) pthread_cond_wait(&pool.wake, &pool.mutex);
      pthread_mutex_unlock(&pool.mutex);
    }
    ++seen;
    if (pool.ends) return NULL;
    take_part(index);
    atomic_fetch_sub(&pool.running, 1);
  }
}

static void start_round(void) {
  pthread_mutex_lock(&pool.mutex);
  atomic_fetch_add(&pool.round, 1);
  pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.mutex);
}

static int launch(task function, void* data, int wanted) {
  const int most = pool.workers + 1;
  pool.function = function;
  pool.data = data;
  pool.count = wanted > 0 && wanted < most ? wanted : most;
  atomic_store(&pool.failed, 0);
  if (pool.count > 1) {
    atomic_store(&pool.running, pool.workers);
    start_round();
  }
  take_part(0);
  if (pool.count > 1) {
    while (atomic_load(&pool.running) > 0) sched_yield();
  }
  return atomic_load(&pool.failed) ? -1 : 0;
}

/* Kernels call through these pointers, which TVM's loader sets; weak, for a model whose kernels have no use for one. */
extern void *__TVMBackendAllocWorkspace __attribute__((weak)), *__TVMBackendFreeWorkspace __attribute__((weak));
extern void* __TVMBackendParallelLaunch __attribute__((weak));

static void set_pointers(void) {
  if (&__TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = (void*)allocate;
  if (&__TVMBackendFreeWorkspace) __TVMBackendFreeWorkspace = (void*)release;
  if (&__TVMBackendParallelLaunch) __TVMBackendParallelLaunch = (void*)launch;
}

/* ---- model.h ---- */

static int check_processor(void) {
  char missing[512] = "";
  size_t at = 0;
  const char* const* feature;
  for (feature = plan_features; *feature != NULL && at < sizeof missing; ++feature) {
    if (!graphopt_processor_has(*feature)) {
      at += (size_t)snprintf(missing + at, sizeof missing - at, at ? ", %s" : "%s", *feature);
    }
  }
  if (at == 0 && plan_tiles && !graphopt_allow_tiles()) {
    at += (size_t)snprintf(missing, sizeof missing, "AMX tile registers that the system lets it use");
  }
  if (at == 0) return 0;
  snprintf(error_text, sizeof error_text, "this processor lacks what the model was built for (%s): %s", plan_mcpu,
           missing);
  return 1;
}

static int start_workers(int threads) {
  int i;
  if (threads < 1) {
    cpu_set_t allowed;
    threads = sched_getaffinity(0, sizeof allowed, &allowed) == 0 ? CPU_COUNT(&allowed) : 1;
  }
  pool.ends = 0;
  pool.workers = 0;
  atomic_store(&pool.round, 0);
  pool.threads = calloc((size_t)threads, sizeof *pool.threads);
  if (pool.threads == NULL) return fail("out of memory");
  for (i = 1; i < threads; ++i) {
    if (pthread_create(&pool.threads[i - 1], NULL, work, (void*)(intptr_t)i) != 0) return fail("no more threads");
    ++pool.workers;
  }
  return 0;
}

int graphopt_open(int threads) {
  int i;
  if (arena != NULL) return fail("the model is open");
  if (check_processor()) return 1;
  set_pointers();
  arena = aligned_alloc(ALIGNMENT, plan_arena_bytes + ALIGNMENT);
  tensors = calloc((size_t)plan_tensor_count + 1, sizeof *tensors);
  if (arena == NULL || tensors == NULL) {
    graphopt_close();
    return fail("out of memory");
  }
  memset(arena, 0, plan_arena_bytes);
  for (i = 0; i < plan_tensor_count; ++i) {
    const plan_tensor* planned = &plan_tensors[i];
    const unsigned char* base = planned->is_constant ? graphopt_constants : arena;
    tensors[i] = (plan_dltensor){.data = (void*)(base + planned->offset), .device_type = CPU, .rank = planned->rank,
                                 .code = planned->code, .bits = planned->bits, .lanes = 1,
                                 .shape = (int64_t*)&plan_lengths[planned->shape],
                                 .strides = (int64_t*)&plan_strides[planned->shape]};
  }
  if (start_workers(threads)) {
    graphopt_close();
    return 1;
  }
  return 0;
}

void* graphopt_input(int index) {
  return arena == NULL || index < 0 || index >= graphopt_input_count ? NULL : tensors[plan_inputs[index]].data;
}

const void* graphopt_output(int index) {
  return arena == NULL || index < 0 || index >= graphopt_output_count ? NULL : tensors[plan_outputs[index]].data;
}

int graphopt_run(void) {
  plan_argument arguments[plan_most_arguments];
  int step, i;
  if (arena == NULL) return fail("the model is not open");
  for (step = 0; step < plan_call_count; ++step) {
    const plan_call* call = &plan_calls[step];
    plan_argument result = {0, 0, {0}};
    for (i = 0; i < call->count; ++i) {
      arguments[i] = (plan_argument){.type = TENSOR, .value = {.pointer = &tensors[plan_arguments[call->first + i]]}};
    }
    error_text[0] = '\0';
    if (call->kernel(NULL, arguments, call->count, &result) != 0) {
      if (error_text[0] == '\0') snprintf(error_text, sizeof error_text, "the kernel %s failed", call->name);
      return 1;
    }
  }
  return 0;
}

void graphopt_close(void) {
  int i;
  if (pool.threads != NULL) {
    pool.ends = 1;
    start_round();
    for (i = 0; i < pool.workers; ++i) pthread_join(pool.threads[i], NULL);
    free(pool.threads);
    pool.threads = NULL;
  }
  free(tensors);
  free(arena);
  tensors = NULL;
  arena = NULL;
}

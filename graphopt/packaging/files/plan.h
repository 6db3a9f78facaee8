/* What the tables in plan.c are: written by graphopt for one model, read by static_model.c. */
#ifndef GRAPHOPT_PLAN_H_
#define GRAPHOPT_PLAN_H_

#include <stdint.h>

#include "model.h"

/* DLPack's tensor. */
typedef struct {
  void* data;
  int32_t device_type, device_id;
  int32_t rank;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
} plan_dltensor;

/* An argument as TVM's compiled functions take it. */
typedef struct {
  int32_t type;
  uint32_t padding;
  union {
    int64_t number;
    void* pointer;
  } value;
} plan_argument;

typedef int (*plan_kernel)(void* self, const plan_argument* arguments, int32_t count, plan_argument* result);

/* A tensor lies in the constants or in the arena; its lengths are those from `shape` on in plan_lengths. */
typedef struct {
  uint8_t is_constant, code, bits;
  int32_t rank, shape;
  uint64_t offset;
} plan_tensor;

/* A kernel and its arguments: numbers of tensors, from `first` on in plan_arguments. */
typedef struct {
  plan_kernel kernel;
  const char* name;
  int32_t first, count;
} plan_call;

extern const char plan_arch[], plan_mcpu[];
extern const char* const plan_features[]; /* ends with NULL */
extern const int plan_tiles;              /* whether kernels use AMX tile registers */
extern const uint64_t plan_arena_bytes;
extern const int plan_tensor_count, plan_call_count, plan_most_arguments, plan_length_count;
extern const plan_tensor plan_tensors[];
extern const plan_call plan_calls[];
extern const int32_t plan_arguments[], plan_inputs[], plan_outputs[];
extern const int64_t plan_lengths[], plan_strides[];
extern const unsigned char graphopt_constants[];

#endif /* GRAPHOPT_PLAN_H_ */

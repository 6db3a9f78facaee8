/* A model as an object file: weights, code, and what runs them. C99 and C++; Linux. There is one model to a program, used
 * by one thread at a time.
 *
 *   if (graphopt_open(0)) return fail(graphopt_error());
 *   fill graphopt_input(0), graphopt_inputs[0].bytes bytes;
 *   if (graphopt_run()) return fail(graphopt_error());
 *   read graphopt_output(0);
 */
#ifndef GRAPHOPT_MODEL_H_
#define GRAPHOPT_MODEL_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* An input or output; `dtype` is NumPy's name of the element type, elements lie in C order. */
typedef struct {
  const char* name;
  const char* dtype;
  int rank;
  const int64_t* shape;
  size_t bytes;
} graphopt_tensor;

extern const int graphopt_input_count, graphopt_output_count;
extern const graphopt_tensor graphopt_inputs[], graphopt_outputs[];

/* Get ready: `threads` work on a run; 0: all processors this process may use. 0, or 1 with graphopt_error(): this
 * processor lacks an instruction set that the model was built for, or there is no memory. */
int graphopt_open(int threads);

/* Memory of an input, 64-byte aligned; it keeps its content from run to run. */
void* graphopt_input(int index);

/* Compute the outputs. 0, or 1 with graphopt_error(). */
int graphopt_run(void);

/* An output of the last run, until the next one. */
const void* graphopt_output(int index);

/* What went wrong, in a sentence. */
const char* graphopt_error(void);

/* End the threads and free the memory. */
void graphopt_close(void);

#ifdef __cplusplus
}
#endif

#endif /* GRAPHOPT_MODEL_H_ */

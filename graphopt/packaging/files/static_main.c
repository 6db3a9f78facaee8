/* run [-t THREADS] [-o FOLDER] INPUT.npy...: run the model once on the arrays given, in the order of its inputs; every
 * output goes to FOLDER/NAME.npy. Without arrays it says what the model takes and gives. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"
#include "npy.h"

static void say(const char* what, const graphopt_tensor* tensor) {
  char shape[512];
  npy_shape(tensor->shape, tensor->rank, shape, sizeof shape);
  printf("%s %s: %s%s\n", what, tensor->name, tensor->dtype, shape);
}

static int complain(const char* text) {
  fprintf(stderr, "%s\n", text);
  return 1;
}

static int run(char** files, int count, const char* folder, int threads) {
  char error[1024], path[4096];
  int i;
  if (count != graphopt_input_count) {
    fprintf(stderr, "the model takes %d inputs, %d files were given\n", graphopt_input_count, count);
    return 1;
  }
  if (graphopt_open(threads)) return complain(graphopt_error());
  for (i = 0; i < count; ++i) {
    const graphopt_tensor* each = &graphopt_inputs[i];
    if (npy_read(files[i], each->dtype, each->shape, each->rank, graphopt_input(i), each->bytes, error, sizeof error)) {
      return complain(error);
    }
  }
  if (graphopt_run()) return complain(graphopt_error());
  for (i = 0; i < graphopt_output_count; ++i) {
    const graphopt_tensor* each = &graphopt_outputs[i];
    char* at = path + snprintf(path, sizeof path, "%s/", folder);
    snprintf(at, sizeof path - (size_t)(at - path), "%s.npy", each->name);
    for (; *at != '\0'; ++at) {
      if (*at == '/') *at = '_';
    }
    if (npy_write(path, each->dtype, each->shape, each->rank, graphopt_output(i), each->bytes, error, sizeof error)) {
      return complain(error);
    }
  }
  graphopt_close();
  return 0;
}

int main(int count, char** arguments) {
  const char* folder = ".";
  int threads = 0, i = 1;
  for (; i + 1 < count; i += 2) {
    if (strcmp(arguments[i], "-o") == 0) {
      folder = arguments[i + 1];
    } else if (strcmp(arguments[i], "-t") == 0) {
      threads = atoi(arguments[i + 1]);
    } else {
      break;
    }
  }
  if (i < count) return run(arguments + i, count - i, folder, threads);
  for (i = 0; i < graphopt_input_count; ++i) say("input", &graphopt_inputs[i]);
  for (i = 0; i < graphopt_output_count; ++i) say("output", &graphopt_outputs[i]);
  fprintf(stderr, "usage: run [-t THREADS] [-o FOLDER] INPUT.npy...\n");
  return 0;
}

/* Reads and writes NumPy's .npy files, as far as a model needs: C order, little endian. For C99 and C++.
 *
 * Source: numpy.lib.format, versions 1 to 3 of the file format. */
#ifndef GRAPHOPT_NPY_H_
#define GRAPHOPT_NPY_H_

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NPY_HEADER = 2048 };

/* How .npy files spell an element type that is known by NumPy's name; NULL where it has no spelling. */
static inline const char* npy_descr(const char* dtype) {
  static const char* const known[][2] = {
      {"float32", "<f4"}, {"float64", "<f8"}, {"float16", "<f2"}, {"int8", "|i1"},   {"int16", "<i2"},  {"int32", "<i4"},
      {"int64", "<i8"},   {"uint8", "|u1"},   {"uint16", "<u2"},  {"uint32", "<u4"}, {"uint64", "<u8"}, {"bool", "|b1"},
  };
  size_t i;
  for (i = 0; i < sizeof known / sizeof known[0]; ++i) {
    if (strcmp(known[i][0], dtype) == 0) return known[i][1];
  }
  return NULL;
}

/* "(1, 3, 224, 224)", as Python writes it. */
static inline void npy_shape(const int64_t* shape, int rank, char* text, size_t size) {
  size_t at = (size_t)snprintf(text, size, "(");
  int i;
  for (i = 0; i < rank && at < size; ++i) {
    at += (size_t)snprintf(text + at, size - at, i ? ", %" PRId64 : "%" PRId64, shape[i]);
  }
  if (at < size) snprintf(text + at, size - at, rank == 1 ? ",)" : ")");
}

/* Fill `data` with the `bytes` bytes of an array of this type and shape. 0 where it worked; else 1, and `error` says in a
 * sentence why not. */
static inline int npy_read(const char* path, const char* dtype, const int64_t* shape, int rank, void* data, size_t bytes,
                           char* error, size_t error_size) {
  unsigned char start[12];
  char header[NPY_HEADER], wanted_shape[512], wanted_type[32], found[64];
  const char* descr = npy_descr(dtype);
  size_t length;
  FILE* file = fopen(path, "rb");
  if (file == NULL) {
    snprintf(error, error_size, "%s cannot be opened", path);
    return 1;
  }
  if (descr == NULL || fread(start, 1, 10, file) != 10 || memcmp(start, "\x93NUMPY", 6) != 0) {
    fclose(file);
    snprintf(error, error_size, descr ? "%s is no .npy file" : "%s cannot hold a %s", path, dtype);
    return 1;
  }
  length = start[8] | (size_t)start[9] << 8;
  if (start[6] > 1) {
    length = fread(start + 10, 1, 2, file) == 2 ? length | (size_t)start[10] << 16 | (size_t)start[11] << 24 : sizeof header;
  }
  if (length >= sizeof header || fread(header, 1, length, file) != length) {
    fclose(file);
    snprintf(error, error_size, "%s is damaged", path);
    return 1;
  }
  header[length] = '\0';
  npy_shape(shape, rank, found, sizeof found);
  snprintf(wanted_shape, sizeof wanted_shape, "'shape': %s", found);
  snprintf(wanted_type, sizeof wanted_type, "'descr': '%s'", descr);
  if (!strstr(header, wanted_type) || !strstr(header, "'fortran_order': False") || !strstr(header, wanted_shape)) {
    header[strcspn(header, "}") + 1 < length ? strcspn(header, "}") + 1 : length] = '\0';
    snprintf(error, error_size, "%s is not %s%s in C order: it says %.200s", path, dtype, found, header);
    fclose(file);
    return 1;
  }
  if (fread(data, 1, bytes, file) != bytes) {
    fclose(file);
    snprintf(error, error_size, "%s is cut short", path);
    return 1;
  }
  fclose(file);
  return 0;
}

/* 0 where it worked; else 1, and `error` says why not. */
static inline int npy_write(const char* path, const char* dtype, const int64_t* shape, int rank, const void* data,
                            size_t bytes, char* error, size_t error_size) {
  char header[NPY_HEADER], text[512];
  const char* descr = npy_descr(dtype);
  size_t used, whole;
  int failed;
  FILE* file = descr ? fopen(path, "wb") : NULL;
  if (file == NULL) {
    snprintf(error, error_size, "%s cannot be written", path);
    return 1;
  }
  npy_shape(shape, rank, text, sizeof text);
  used = (size_t)snprintf(header, sizeof header, "{'descr': '%s', 'fortran_order': False, 'shape': %s, }", descr, text);
  whole = (10 + used + 1 + 63) / 64 * 64; /* the data starts at a multiple of 64 */
  memset(header + used, ' ', whole - 10 - used);
  header[whole - 11] = '\n';
  {
    const unsigned char start[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, (unsigned char)((whole - 10) & 255),
                                     (unsigned char)((whole - 10) >> 8)};
    failed = fwrite(start, 1, 10, file) != 10 || fwrite(header, 1, whole - 10, file) != whole - 10 ||
             fwrite(data, 1, bytes, file) != bytes;
  }
  failed = fclose(file) != 0 || failed;
  if (failed) snprintf(error, error_size, "%s cannot be written", path);
  return failed;
}

#endif /* GRAPHOPT_NPY_H_ */

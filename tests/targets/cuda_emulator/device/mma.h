// nvcuda::wmma as loops. A fragment is whole in the first thread of its warp; the others have nothing to do.
#pragma once
#include "emulated.h"
namespace nvcuda {
namespace wmma {
struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  static constexpr int rows = std::is_same_v<Use, matrix_b> ? K : M;
  static constexpr int columns = std::is_same_v<Use, matrix_a> ? K : N;
  // halves are kept as the float32 numbers they are, so that loops over them are fast
  std::conditional_t<sizeof(T) == 2, float, T> x[rows * columns];
};
inline bool first() { return __emu_linear() % 32 == 0; }

template <typename F, typename T>
void fill_fragment(F& f, T value) {
  if (first())
    for (auto& each : f.x) each = value;
}
template <typename Use, int M, int N, int K, typename T, typename Layout, typename S>
void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& f, const S* from, unsigned stride) {
  if ((size_t)from % 32 || stride * sizeof(S) % 16) abort();  // as the programming guide demands
  if (!first()) return;
  for (int i = 0; i < f.rows; i++)
    for (int j = 0; j < f.columns; j++)
      f.x[i * f.columns + j] = std::is_same_v<Layout, col_major> ? from[j * stride + i] : from[i * stride + j];
}
template <int M, int N, int K, typename T, typename S>
void load_matrix_sync(fragment<accumulator, M, N, K, T>& f, const S* from, unsigned stride, layout_t layout) {
  if (!first()) return;
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) f.x[i * N + j] = layout == mem_row_major ? from[i * stride + j] : from[j * stride + i];
}
template <int M, int N, int K, typename T, typename S>
void store_matrix_sync(S* to, const fragment<accumulator, M, N, K, T>& f, unsigned stride, layout_t layout) {
  if ((size_t)to % 32 || stride * sizeof(S) % 16) abort();
  if (!first()) return;
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) (layout == mem_row_major ? to[i * stride + j] : to[j * stride + i]) = f.x[i * N + j];
}
template <int M, int N, int K, typename T, typename A, typename LA, typename LB>
void mma_sync(fragment<accumulator, M, N, K, T>& d, const fragment<matrix_a, M, N, K, A, LA>& a,
              const fragment<matrix_b, M, N, K, A, LB>& b, const fragment<accumulator, M, N, K, T>& c) {
  if (!first()) return;
  for (int i = 0; i < M; i++) {
    T sums[N];
    for (int j = 0; j < N; j++) sums[j] = c.x[i * N + j];
    for (int k = 0; k < K; k++)
      for (int j = 0; j < N; j++) sums[j] += (T)a.x[i * K + k] * (T)b.x[k * N + j];
    for (int j = 0; j < N; j++) d.x[i * N + j] = sums[j];
  }
}
}  // namespace wmma
}  // namespace nvcuda

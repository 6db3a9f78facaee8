// What CUDA C++ has and C++ has not, for the kernels that TVM writes.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <type_traits>

struct __emu_uint3 {
  unsigned x, y, z;
};
extern "C" {
extern __emu_uint3 __emu_thread, __emu_block, __emu_block_dim, __emu_grid_dim;
extern unsigned char* __emu_dynamic_shared;
void __emu_sync_block();
void __emu_sync_warp();
void __emu_sync_cluster();
void __emu_copy16(void* to, const void* from, bool inside);
void __emu_end_group();
void __emu_await(size_t left);
const void* __emu_shared_of(const void* own, unsigned block);
unsigned __emu_linear();
}
#define threadIdx __emu_thread
#define blockIdx __emu_block
#define blockDim __emu_block_dim
#define gridDim __emu_grid_dim
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __syncthreads() __emu_sync_block()
#define __syncwarp(...) __emu_sync_warp()
#define __activemask() 0xffffffffu
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0

using std::max;
using std::min;
inline float max(float a, double b) { return a > b ? a : (float)b; }

template <typename T>
T __emu_shuffle(T value, unsigned from) {
  static T slots[64][32];
  unsigned me = __emu_linear(), warp = me / 32;
  slots[warp][me % 32] = value;
  __emu_sync_warp();
  T found = slots[warp][from % 32];
  __emu_sync_warp();
  return found;
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane, int width = 32) {
  unsigned me = __emu_linear() % 32;
  return __emu_shuffle(value, me / width * width + lane % width);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned delta, int width = 32) {
  unsigned me = __emu_linear() % 32, to = me + delta;
  return __emu_shuffle(value, to / width == me / width ? to : me);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, unsigned mask, int width = 32) {
  return __emu_shuffle(value, (__emu_linear() % 32) ^ mask);
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}

#define __EMU_VECTOR(type, base)                                                             \
  struct __attribute__((aligned(sizeof(base)))) type##1 { base x; };                         \
  struct __attribute__((aligned(2 * sizeof(base)))) type##2 { base x, y; };                  \
  struct type##3 { base x, y, z; };                                                          \
  struct __attribute__((aligned(4 * sizeof(base) > 16 ? 16 : 4 * sizeof(base)))) type##4 {   \
    base x, y, z, w;                                                                         \
  };                                                                                         \
  inline type##1 make_##type##1(base x) { return {x}; }                                      \
  inline type##2 make_##type##2(base x, base y) { return {x, y}; }                           \
  inline type##3 make_##type##3(base x, base y, base z) { return {x, y, z}; }                \
  inline type##4 make_##type##4(base x, base y, base z, base w) { return {x, y, z, w}; }
__EMU_VECTOR(float, float)
__EMU_VECTOR(double, double)
__EMU_VECTOR(int, int)
__EMU_VECTOR(uint, unsigned)
__EMU_VECTOR(short, short)
__EMU_VECTOR(ushort, unsigned short)
__EMU_VECTOR(char, signed char)
__EMU_VECTOR(uchar, unsigned char)
__EMU_VECTOR(longlong, long long)
__EMU_VECTOR(ulonglong, unsigned long long)
using dim3 = uint3;

inline float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { int y; memcpy(&y, &x, 4); return y; }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __float2int_rn(float x) { return (int)nearbyintf(x); }

// The device functions of `graphopt.targets.schedules.cuda.intrinsics`, which are PTX there.
inline void graphopt_copy16(void* to, const void* from, bool inside) { __emu_copy16(to, from, inside); }
inline void graphopt_copies_end() { __emu_end_group(); }
inline void graphopt_copies_await(int left) { __emu_await(left); }
inline void graphopt_cluster_barrier() { __emu_sync_cluster(); }
template <typename T>
void graphopt_cluster_sum(T* sums, const T* own, int count, int blocks) {
  if ((size_t)own % (count * sizeof(T))) abort();
  for (int v = 0; v < count; v++) sums[v] = 0;
  for (int block = 0; block < blocks; block++)
    for (int v = 0; v < count; v++) sums[v] += ((const T*)__emu_shared_of(own, block))[v];
}

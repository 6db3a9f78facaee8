// half: stored in 16 bits, computed in float32 where CUDA's operators would round the result to 16 bits as well.
#pragma once
#include "emulated.h"
using half = _Float16;
using __half = _Float16;
struct __attribute__((aligned(4))) half2 { half x, y; };
using __half2 = half2;
inline float __half2float(half x) { return (float)x; }
inline half __float2half_rn(float x) { return (half)x; }
inline half __float2half(float x) { return (half)x; }
inline half2 make_half2(half x, half y) { return {x, y}; }
inline unsigned short __half_as_ushort(half x) { unsigned short y; memcpy(&y, &x, 2); return y; }
inline half __ushort_as_half(unsigned short x) { half y; memcpy(&y, &x, 2); return y; }
inline bool __hgt(half a, half b) { return a > b; }
inline bool __hlt(half a, half b) { return a < b; }
inline half hexp(half x) { return (half)expf(x); }

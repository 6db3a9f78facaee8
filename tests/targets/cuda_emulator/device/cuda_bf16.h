// nv_bfloat16: stored in 16 bits, rounded to nearest even.
#pragma once
#include "emulated.h"
struct nv_bfloat16 {
  unsigned short bits;
  nv_bfloat16() = default;
  nv_bfloat16(float x) {
    unsigned u;
    memcpy(&u, &x, 4);
    bits = x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
  operator float() const {
    unsigned u = (unsigned)bits << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
  }
};
using __nv_bfloat16 = nv_bfloat16;
struct __attribute__((aligned(4))) nv_bfloat162 {
  nv_bfloat16 x, y;
  nv_bfloat162() = default;
  nv_bfloat162(nv_bfloat16 a, nv_bfloat16 b) : x(a), y(b) {}
};
inline bool __hgt(nv_bfloat16 a, nv_bfloat16 b) { return (float)a > (float)b; }
inline bool __hlt(nv_bfloat16 a, nv_bfloat16 b) { return (float)a < (float)b; }
using __nv_bfloat162 = nv_bfloat162;
inline nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline nv_bfloat16 __float2bfloat16(float x) { return x; }
inline float __bfloat162float(nv_bfloat16 x) { return x; }

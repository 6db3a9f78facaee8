"""What CUDA C++ has no operators for: asynchronous copies, and blocks of a cluster reading each other's memory.

Each is a device function of a few lines of PTX that TVM writes in front of the kernels which call it.

Source: PTX ISA, "cp.async", "barrier.cluster", "mapa", "ld.shared::cluster".
"""

from __future__ import annotations

from typing import Any

_COPY = """
__device__ __forceinline__ void graphopt_copy16(void* to, const void* from, bool inside) {
  unsigned there = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(there), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}
"""
_COMMIT = """
__device__ __forceinline__ void graphopt_copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
"""
_AWAIT = """
__device__ __forceinline__ void graphopt_copies_await(int left) {
  if (left == 0) asm volatile("cp.async.wait_group 0;" ::: "memory");
  if (left == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
  if (left == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
  if (left == 3) asm volatile("cp.async.wait_group 3;" ::: "memory");
  if (left == 4) asm volatile("cp.async.wait_group 4;" ::: "memory");
}
"""
_CLUSTER_BARRIER = """
__device__ __forceinline__ void graphopt_cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
"""
_CLUSTER_SUM = """
template <typename T>
__device__ __forceinline__ void graphopt_cluster_sum(T* sums, const T* own, int count, int blocks) {
  unsigned here = (unsigned)__cvta_generic_to_shared(own);
#pragma unroll
  for (int v = 0; v < count; v++) sums[v] = 0;
#pragma unroll
  for (int block = 0; block < blocks; block++) {
    unsigned there, word[4];
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(block));
    if (count == 4) {
      asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) : "r"(there) : "memory");
    } else {
#pragma unroll
      for (int v = 0; v < count; v++)
        asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(word[v]) : "r"(there + 4 * v) : "memory");
    }
#pragma unroll
    for (int v = 0; v < count; v++) sums[v] += *(T*)&word[v];
  }
}
"""
SOURCES = (_COPY, _COMMIT, _AWAIT, _CLUSTER_BARRIER, _CLUSTER_SUM)
"""As TVM writes them; an emulator has its own."""
MOST_LEFT = 4
"""What `await_copies` can leave under way."""


def copy16(to, source, inside) -> Any:
    """Have 16 bytes copied from memory to shared memory; zeros where not `inside`: then nothing is read."""
    return _call("graphopt_copy16", to, source, inside, source_code=_COPY)


def end_group() -> Any:
    """What was asked for since the last one is a group."""
    return _call("graphopt_copies_end", source_code=_COMMIT)


def await_copies(left: int) -> Any:
    """Wait until only the last `left` groups of this thread are under way; other threads' need a barrier."""
    assert 0 <= left <= MOST_LEFT
    return _call("graphopt_copies_await", left, source_code=_AWAIT)


def cluster_barrier() -> Any:
    """All threads of a cluster's blocks wait for each other, and then see what the others wrote."""
    return _call("graphopt_cluster_barrier", source_code=_CLUSTER_BARRIER)


def cluster_sum(sums, own, count: int, blocks: int) -> Any:
    """`sums[:count]` = those at the place of `own` in the shared memory of each of a cluster's blocks, added up."""
    return _call("graphopt_cluster_sum", sums, own, count, blocks, source_code=_CLUSTER_SUM)


def barrier() -> Any:
    """The threads of a block wait for each other."""
    from tvm import tirx

    return tirx.call_intrin("void", "tirx.tvm_storage_sync", "shared")


def _call(name: str, *arguments, source_code: str) -> Any:
    from tvm.backend.cuda import op

    return op.cuda_func_call(name, *arguments, source_code=source_code)

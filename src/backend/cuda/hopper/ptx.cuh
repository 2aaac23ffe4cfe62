// Hopper's instructions that CUDA C++ has no words for: barriers in shared memory, copies of tiles by TMA, matrix products of warp
// groups. For .cu files of this folder alone.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace comfytp::backend::cuda::hopper {

__device__ __forceinline__ std::uint32_t shared_address(const void* p) { return static_cast<std::uint32_t>(__cvta_generic_to_shared(p)); }

// ---- barriers
__device__ __forceinline__ void init_barrier(std::uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void expect_bytes(std::uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
/// Arrives at the barrier in the same place of another block of the cluster.
__device__ __forceinline__ void arrive(std::uint64_t* barrier, int block) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(block)
      : "memory");
}
__device__ __forceinline__ void wait(std::uint64_t* barrier, int phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra gone;\n"
      "bra again;\n"
      "gone:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
}

/// All threads of all blocks of the cluster.
__device__ __forceinline__ void sync_cluster() { asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory"); }

// ---- tiles of a matrix, by a tensor map; (x, y) counts elements along a row, and rows
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<std::uint64_t>(map)) : "memory");
}
__device__ __forceinline__ void load_tile(void* to, const CUtensorMap* map, int x, int y, std::uint64_t* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
               "l"(reinterpret_cast<std::uint64_t>(map)), "r"(shared_address(barrier)), "r"(x), "r"(y)
               : "memory");
}
/// To the same place of all blocks in `mask`, each of whose barriers in the same place counts the bytes.
__device__ __forceinline__ void load_tile(void* to, const CUtensorMap* map, int x, int y, std::uint64_t* barrier, std::uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(
          shared_address(to)),
      "l"(reinterpret_cast<std::uint64_t>(map)), "r"(shared_address(barrier)), "h"(mask), "r"(x), "r"(y)
      : "memory");
}

/// From shared memory to a tile of a matrix; what lies outside the matrix is left out. Of the calling thread's group of stores.
__device__ __forceinline__ void store_tile(const CUtensorMap* map, int x, int y, const void* from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(reinterpret_cast<std::uint64_t>(map)),
               "r"(shared_address(from)), "r"(x), "r"(y)
               : "memory");
}
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/// Until the thread's stores have read what they store.
__device__ __forceinline__ void wait_stores() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
/// What threads wrote to shared memory is there for store_tile(), behind a barrier.
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
/// Four matrices of 8 x 8 elements to shared memory: thread t has of each the elements 2 (t % 4) and the next of row t / 4, and the address of row
/// t % 8 of matrix t / 8.
__device__ __forceinline__ void store_matrices(void* row, const std::uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

// ---- registers
template <int COUNT>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

__device__ __forceinline__ void sync_warp_group(int barrier) { asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory"); }

// ---- matrix products of a warp group
/// Of a tile in shared memory whose rows are 128 bytes, swizzled in eights of rows.
__device__ __forceinline__ std::uint64_t describe_tile(const void* tile) {
  constexpr std::uint64_t kRowsOfEight = 1024 >> 4, kSwizzle128 = 1;
  return ((shared_address(tile) & 0x3ffff) >> 4) | std::uint64_t{1} << 16 | kRowsOfEight << 32 | kSwizzle128 << 62;
}
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

#define COMFYTP_8(v, i) "+f"(v[i]), "+f"(v[i + 1]), "+f"(v[i + 2]), "+f"(v[i + 3]), "+f"(v[i + 4]), "+f"(v[i + 5]), "+f"(v[i + 6]), "+f"(v[i + 7])
#define COMFYTP_32(v, i) COMFYTP_8(v, i), COMFYTP_8(v, i + 8), COMFYTP_8(v, i + 16), COMFYTP_8(v, i + 24)
#define COMFYTP_PRODUCT(TYPE)                                                                                                                       \
  asm volatile(                                                                                                                                     \
      "{\n"                                                                                                                                         \
      ".reg .pred adds;\n"                                                                                                                          \
      "setp.ne.b32 adds, %130, 0;\n"                                                                                                                \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE                                                                                  \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, "   \
      "%29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "     \
      "%56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, "     \
      "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, " \
      "%109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, adds, 1, 1, " \
      "0, 0;\n"                                                                                                                                     \
      "}\n"                                                                                                                                         \
      : COMFYTP_32(d, 0), COMFYTP_32(d, 32), COMFYTP_32(d, 64), COMFYTP_32(d, 96)                                                                   \
      : "l"(a), "l"(b), "r"(adds))

/// d [64, 256] = (adds ? d : 0) + a [64, 16] b [256, 16]^T. Thread t has of row t / 32 * 16 + t % 32 / 4 (+ 8 in d[4 j + 2], d[4 j + 3]) the columns
/// 8 j + t % 4 * 2 and the next.
template <typename T>
__device__ __forceinline__ void add_product(float (&d)[128], std::uint64_t a, std::uint64_t b, int adds);
template <>
__device__ __forceinline__ void add_product<__half>(float (&d)[128], std::uint64_t a, std::uint64_t b, int adds) { COMFYTP_PRODUCT("f16"); }
template <>
__device__ __forceinline__ void add_product<__nv_bfloat16>(float (&d)[128], std::uint64_t a, std::uint64_t b, int adds) { COMFYTP_PRODUCT("bf16"); }
#undef COMFYTP_PRODUCT
#undef COMFYTP_32
#undef COMFYTP_8

}  // namespace comfytp::backend::cuda::hopper

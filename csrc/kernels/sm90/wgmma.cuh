// Warpgroup matrix products (wgmma): D += A B for 64 rows of A, issued by four consecutive warps.
// Accumulators lie as in m16n8 tiles: warp w holds rows 16 w + lane / 4 + {0, 8}; d[4 n + 2 half +
// e] is column 8 n + 2 (lane % 4) + e of row half. Products run asynchronously: between issue and
// wgmma_wait neither D nor a register A may be touched.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

namespace sla2 {

// Orders earlier register accesses before the products that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending of the newest groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Ties registers to this point of the program, so that the compiler neither moves their uses across
// a wait nor copies them.
template <typename T, int kCount>
__device__ __forceinline__ void pin(T (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      asm volatile("" : "+f"(x[i])::"memory");
    } else {
      asm volatile("" : "+r"(x[i])::"memory");
    }
  }
}

// A value that the compiler shall keep and not make anew where it is used.
__device__ __forceinline__ void pin(int& x) { asm volatile("" : "+r"(x)); }

// A operands for the next product, made while the one that reads `target` was in flight. ptxas
// gives the source of a plain copy the same registers, and serialises the products for it (C7513).
template <int kSteps>
__device__ __forceinline__ void copy_operands(uint32_t (&target)[kSteps][4],
                                              const uint32_t (&source)[kSteps][4]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      asm volatile("mov.b32 %0, %1;" : "=r"(target[step][i]) : "r"(source[step][i]));
    }
  }
}

enum class Swizzle : uint64_t { k128 = 1, k64 = 2 };

// Shared-memory operand, 1024-byte aligned tiles of 128-byte (64-byte) rows with the hardware
// swizzle.
//   K-major: rows of the M or N index; stride_bytes between groups of eight rows (1024; 512 for
//   64-byte rows); leading_bytes unused. The next 32 bytes of K are 32 bytes further.
//   MN-major (16-bit, "transposed"): rows of the K index, 64 M or N values each; stride_bytes
//   between groups of eight rows, leading_bytes from one 64-wide column tile to the next. The next
//   16 of K are 2048 bytes further.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, int leading_bytes,
                                                     int stride_bytes, Swizzle swizzle) {
  return static_cast<uint64_t>((address & 0x3ffffu) >> 4) |
         static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}
// The descriptor `bytes` further on (a multiple of 16).
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

// Text and operands of an instruction with 4 to 64 accumulators. The operands after them are A
// (a descriptor, or four registers), the descriptor of B, and whether D is added to.
#define SLA2_TEXT_4 "{%0, %1, %2, %3}"
#define SLA2_TEXT_16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define SLA2_TEXT_28                                                                  \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27}"
#define SLA2_TEXT_32                                                                            \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, "                                                                                       \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define SLA2_TEXT_64                                                                            \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, "                                                                                       \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, "  \
  "%39, "                                                                                       \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, "  \
  "%58, "                                                                                       \
  "%59, %60, %61, %62, %63}"
#define SLA2_OUT_4(kind, d, i) kind(d[i]), kind(d[i + 1]), kind(d[i + 2]), kind(d[i + 3])
#define SLA2_OUT_16(kind, d, i)                                                   \
  SLA2_OUT_4(kind, d, i), SLA2_OUT_4(kind, d, i + 4), SLA2_OUT_4(kind, d, i + 8), \
      SLA2_OUT_4(kind, d, i + 12)
#define SLA2_OUT_28(kind, d, i)                                                      \
  SLA2_OUT_16(kind, d, i), SLA2_OUT_4(kind, d, i + 16), SLA2_OUT_4(kind, d, i + 20), \
      SLA2_OUT_4(kind, d, i + 24)
#define SLA2_OUT_32(kind, d, i) SLA2_OUT_16(kind, d, i), SLA2_OUT_16(kind, d, i + 16)
#define SLA2_OUT_64(kind, d, i) SLA2_OUT_32(kind, d, i), SLA2_OUT_32(kind, d, i + 32)

// One overload; a, b, sum: the numbers of the operands; tail: the instruction's last operands.
#define SLA2_WGMMA_SHARED_A(name, type, kind, count, instruction, a, b, sum, tail)     \
  __device__ __forceinline__ void name(type(&d)[count], uint64_t left, uint64_t right, \
                                       int accumulate) {                               \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #sum                             \
                 ", 0;\n"                                                              \
                 "wgmma.mma_async.sync.aligned." instruction " " SLA2_TEXT_##count     \
                 ", %" #a ", %" #b ", p" tail ";\n}"                                   \
                 : SLA2_OUT_##count(kind, d, 0)                                        \
                 : "l"(left), "l"(right), "r"(accumulate));                            \
  }
#define SLA2_WGMMA_REGISTER_A(name, type, kind, count, instruction, a0, a1, a2, a3, b, sum, tail)  \
  __device__ __forceinline__ void name(type(&d)[count], const uint32_t (&left)[4], uint64_t right, \
                                       int accumulate) {                                           \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #sum                                         \
                 ", 0;\n"                                                                          \
                 "wgmma.mma_async.sync.aligned." instruction " " SLA2_TEXT_##count                 \
                 ", {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", p" tail ";\n}"              \
                 : SLA2_OUT_##count(kind, d, 0)                                                    \
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right),             \
                   "r"(accumulate));                                                               \
  }
#define SLA2_KIND_INT "+r"
#define SLA2_KIND_FLOAT "+f"

// D (int32) = A B (+ D): int8, both K-major in shared memory, K = 32.
SLA2_WGMMA_SHARED_A(wgmma_s8, int, SLA2_KIND_INT, 32, "m64n64k32.s32.s8.s8", 32, 33, 34, "")

// e4m3, A in registers, B K-major in shared memory, K = 32.
SLA2_WGMMA_REGISTER_A(wgmma_e4m3, float, SLA2_KIND_FLOAT, 16, "m64n32k32.f32.e4m3.e4m3", 16, 17, 18,
                      19, 20, 21, ", 1, 1")
SLA2_WGMMA_REGISTER_A(wgmma_e4m3, float, SLA2_KIND_FLOAT, 28, "m64n56k32.f32.e4m3.e4m3", 28, 29, 30,
                      31, 32, 33, ", 1, 1")
SLA2_WGMMA_REGISTER_A(wgmma_e4m3, float, SLA2_KIND_FLOAT, 32, "m64n64k32.f32.e4m3.e4m3", 32, 33, 34,
                      35, 36, 37, ", 1, 1")
SLA2_WGMMA_REGISTER_A(wgmma_e4m3, float, SLA2_KIND_FLOAT, 64, "m64n128k32.f32.e4m3.e4m3", 64, 65,
                      66, 67, 68, 69, ", 1, 1")

// 16-bit, K = 16; kTransA, kTransB: that operand is MN-major.
template <typename Element, bool kTransA, bool kTransB>
struct Wgmma16;
#define SLA2_WGMMA_16(Element, type)                                                               \
  template <>                                                                                      \
  struct Wgmma16<Element, false, false> {                                                          \
    static SLA2_WGMMA_SHARED_A(mma, float, SLA2_KIND_FLOAT, 32, "m64n64k16.f32." type, 32, 33, 34, \
                               ", 1, 1, 0, 0")                                                     \
  };                                                                                               \
  template <>                                                                                      \
  struct Wgmma16<Element, false, true> {                                                           \
    static SLA2_WGMMA_REGISTER_A(mma, float, SLA2_KIND_FLOAT, 32, "m64n64k16.f32." type, 32, 33,   \
                                 34, 35, 36, 37,                                                   \
                                 ", 1, 1, 1") static SLA2_WGMMA_REGISTER_A(mma, float,             \
                                                                           SLA2_KIND_FLOAT, 64,    \
                                                                           "m64n128k16.f32." type, \
                                                                           64, 65, 66, 67, 68, 69, \
                                                                           ", 1, 1, 1")            \
  };
SLA2_WGMMA_16(__nv_bfloat16, "bf16.bf16")
SLA2_WGMMA_16(__half, "f16.f16")
// clang-format off
template <>
struct Wgmma16<__nv_bfloat16, true, true> {
  static SLA2_WGMMA_SHARED_A(mma, float, SLA2_KIND_FLOAT, 4, "m64n8k16.f32.bf16.bf16",
                             4, 5, 6, ", 1, 1, 1, 1")
  static SLA2_WGMMA_SHARED_A(mma, float, SLA2_KIND_FLOAT, 32, "m64n64k16.f32.bf16.bf16",
                             32, 33, 34, ", 1, 1, 1, 1")
  static SLA2_WGMMA_SHARED_A(mma, float, SLA2_KIND_FLOAT, 64, "m64n128k16.f32.bf16.bf16",
                             64, 65, 66, ", 1, 1, 1, 1")
};

// D = A B^T (+ D): A in registers, B K-major in shared memory.
template <typename Element>
struct WgmmaNt;
#define SLA2_WGMMA_NT(Element, type)                                                      \
  template <>                                                                             \
  struct WgmmaNt<Element> {                                                               \
    static SLA2_WGMMA_REGISTER_A(mma, float, SLA2_KIND_FLOAT, 32, "m64n64k16.f32." type,  \
                                 32, 33, 34, 35, 36, 37, ", 1, 1, 0")                     \
    static SLA2_WGMMA_REGISTER_A(mma, float, SLA2_KIND_FLOAT, 64, "m64n128k16.f32." type, \
                                 64, 65, 66, 67, 68, 69, ", 1, 1, 0")                     \
  };
SLA2_WGMMA_NT(__nv_bfloat16, "bf16.bf16")
SLA2_WGMMA_NT(__half, "f16.f16")
// clang-format on
#undef SLA2_WGMMA_NT

#undef SLA2_TEXT_4
#undef SLA2_TEXT_16
#undef SLA2_TEXT_28
#undef SLA2_TEXT_32
#undef SLA2_TEXT_64
#undef SLA2_OUT_4
#undef SLA2_OUT_16
#undef SLA2_OUT_28
#undef SLA2_OUT_32
#undef SLA2_OUT_64
#undef SLA2_WGMMA_SHARED_A
#undef SLA2_WGMMA_REGISTER_A
#undef SLA2_WGMMA_16
#undef SLA2_KIND_INT
#undef SLA2_KIND_FLOAT

// A warpgroup's registers a thread from here on (setmaxnreg): more, once others have given up as
// many, or fewer.
template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace sla2

// Host side of tensor copies: descriptors of strided tensors for the copy engine.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>
#include <stdint.h>

#include "../common/params.h"

namespace sla2 {

// cuTensorMapEncodeTiled without linking the driver library.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const char* name = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t status = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &result);
#endif
    if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encoder;
}

// Elements of one, two or four bytes; sizes, strides (bytes, of dimensions 1, 2, ...) and box
// innermost first; with the 128-byte swizzle rows of the box are 128 bytes. What lies outside reads
// as zero.
template <int kRank>
cudaError_t encode_tensor_map(CUtensorMap& map, const void* data, const uint64_t (&sizes)[kRank],
                              const uint64_t (&strides)[kRank - 1], const uint32_t (&box)[kRank],
                              int element_bytes = 2,
                              CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  uint32_t element_strides[kRank];
  for (uint32_t& stride : element_strides) stride = 1;
  const CUtensorMapDataType type = element_bytes == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                        : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  const CUresult status =
      encode(&map, type, kRank, const_cast<void*>(data), sizes, strides, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The complement's bits, boxes of the two words of 64 key blocks for `rows` query blocks.
inline cudaError_t encode_mask(CUtensorMap& map, const LinearParams& p, uint32_t rows) {
  const uint64_t pitch = mask_pitch(p.shape.num_q_blocks);
  const uint64_t words = mask_words(p.shape.num_k_blocks);
  return encode_tensor_map<3>(map, p.mask, {pitch, words, static_cast<uint64_t>(p.bh_count)},
                              {pitch * 4, words * pitch * 4}, {rows, 2, 1}, 4,
                              CU_TENSOR_MAP_SWIZZLE_NONE);
}

// A (B, N, H, D) view as [batch][head][token][D], boxes of `rows` tokens by 64 channels. Strides of
// dimensions of size 1 may be anything; the encoder wants a multiple of 16 bytes.
inline cudaError_t encode_tokens(CUtensorMap& map, const TensorView& view, const Shape& shape,
                                 int head_dim, uint32_t rows) {
  const uint64_t heads = shape.num_heads, batch = shape.num_bh / shape.num_heads;
  const auto bytes = [](int64_t stride, uint64_t size) {
    return size == 1 ? uint64_t{16} : static_cast<uint64_t>(stride) * 2;
  };
  const uint64_t sizes[4] = {static_cast<uint64_t>(head_dim), static_cast<uint64_t>(shape.seqlen),
                             heads, batch};
  const uint64_t strides[3] = {bytes(view.stride_token, shape.seqlen),
                               bytes(view.stride_head, heads), bytes(view.stride_batch, batch)};
  const uint32_t box[4] = {64, rows, 1, 1};
  return encode_tensor_map<4>(map, view.data, sizes, strides, box);
}

}  // namespace sla2

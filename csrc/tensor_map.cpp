#include "tensor_map.h"

#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace loradrop {
namespace {

constexpr std::size_t kMaxMaps = 4096;

struct Hash {
  std::size_t operator()(const MapKey& key) const {
    std::size_t hash = 0;
    const std::int64_t parts[] = {key.pointer,   key.rows,     key.columns,
                                  key.stride,    key.box_rows, static_cast<int>(key.type)};
    for (std::int64_t part : parts) {
      hash = hash * 0x9E3779B97F4A7C15u + static_cast<std::size_t>(part);
      hash ^= hash >> 29;
    }
    return hash;
  }
};

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: it is missing or older "
                             "than 12.0");
  }
  return reinterpret_cast<Encode>(function);
}

CUtensorMap encode(const MapKey& key) {
  static const Encode encode = encoder();
  CUtensorMap map;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(key.columns),
                              static_cast<cuuint64_t>(key.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(key.stride) * 2};
  const cuuint32_t box[] = {kChunk, static_cast<cuuint32_t>(key.box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUtensorMapDataType type = key.type == Type::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                               : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  // Elements outside the matrix are filled with zeros, and stores to them are left out.
  const CUresult result =
      encode(&map, type, 2, reinterpret_cast<void*>(key.pointer), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled refuses a matrix of " +
                             std::to_string(key.rows) + " x " + std::to_string(key.columns) +
                             " with stride " + std::to_string(key.stride) + ": error " +
                             std::to_string(static_cast<int>(result)));
  }
  return map;
}

}  // namespace

CUtensorMap tensor_map(const MapKey& key) {
  static std::mutex mutex;
  static std::unordered_map<MapKey, CUtensorMap, Hash> maps;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = maps.find(key);
  if (found != maps.end()) return found->second;
  const CUtensorMap map = encode(key);
  if (maps.size() == kMaxMaps) maps.clear();  // they are made again in a microsecond
  return maps.emplace(key, map).first->second;
}

}  // namespace loradrop

// Tensor maps, as the copy engine of Hopper wants them described. The encoder belongs to the driver
// and is looked up at the first use, so that the library loads on a machine without a driver.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels.h"

namespace loradrop {

// A row-major matrix in global memory, and the boxes of 64 columns that are copied of it.
struct MapKey {
  std::int64_t pointer, rows, columns, stride;  // of rows, in elements
  int box_rows;
  Type type;

  bool operator==(const MapKey&) const = default;
};

// The map of `key`, from a bounded cache. Throws std::runtime_error with the driver's reason.
CUtensorMap tensor_map(const MapKey& key);

}  // namespace loradrop

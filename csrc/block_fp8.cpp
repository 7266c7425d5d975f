// The CPU twin of kernels/block_fp8: magnitudes of blocks of 128 x 128, and their elements as e4m3, bit for bit the reference's.
#include <cstdint>
#include <cstring>
#include <vector>

// The loops are written so that compilers turn them into vector instructions; a clone for each width is chosen when the library is opened.
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
#define TANDEM_WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TANDEM_WIDE
#endif

namespace {

constexpr int64_t kBlock = 128;

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Where the rows and columns of a part lie in its matrix.
struct Part {
  int64_t rows, columns, row_stride, first_row, first_column;
};

// See kernels/block_fp8/triton.py: from 2^-6 on three mantissa bits stay, below it are multiples of 2^-9.
inline uint8_t encoded(uint32_t bits) {
  int32_t magnitude = static_cast<int32_t>(bits & 0x7FFFFFFF);
  const bool is_nan = magnitude > 0x7F800000;
  magnitude = magnitude < 0x43E00000 ? magnitude : 0x43E00000;  // 448
  const int32_t normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960;
  const int32_t subnormal = static_cast<int32_t>(bits_of(float_of(static_cast<uint32_t>(magnitude)) + 16384.0f)) - 0x46800000;
  const int32_t code = is_nan ? 0x7F : magnitude < 0x3C800000 ? subnormal : normal;
  return static_cast<uint8_t>(code | static_cast<int32_t>((bits >> 24) & 0x80));
}

// Calls f(column within the part, number of columns, block of the matrix) for the runs of a row that lie in one block each.
template <typename F>
inline __attribute__((always_inline)) void runs(const Part& part, F f) {
  for (int64_t at = 0; at < part.columns;) {
    const int64_t block = (part.first_column + at) / kBlock;
    const int64_t end = (block + 1) * kBlock - part.first_column;
    const int64_t stop = end < part.columns ? end : part.columns;
    f(at, stop - at, block);
    at = stop;
  }
}

// `columns` are the magnitudes as integers, which have the order of the floats, NaN above all.
template <typename T, int kShift>
inline __attribute__((always_inline)) void largest_of(const T* source, const Part& part, T* columns, float* largest, int64_t stride) {
  constexpr T kMagnitude = static_cast<T>(~T{0}) >> 1;
  for (int64_t row = 0; row < part.rows;) {
    const int64_t block_row = (part.first_row + row) / kBlock;
    const int64_t end = (block_row + 1) * kBlock - part.first_row;
    const int64_t stop = end < part.rows ? end : part.rows;
    for (int64_t c = 0; c < part.columns; ++c) columns[c] = 0;
    for (; row < stop; ++row) {
      const T* from = source + row * part.row_stride;
      for (int64_t c = 0; c < part.columns; ++c) {
        const T magnitude = from[c] & kMagnitude;
        columns[c] = magnitude > columns[c] ? magnitude : columns[c];
      }
    }
    float* of_row = largest + block_row * stride;
    runs(part, [&](int64_t at, int64_t count, int64_t block) __attribute__((always_inline)) {
      T found = 0;
      for (int64_t c = at; c < at + count; ++c) found = columns[c] > found ? columns[c] : found;
      const uint32_t bits = static_cast<uint32_t>(found) << kShift;
      if (bits > bits_of(of_row[block])) of_row[block] = float_of(bits);
    });
  }
}

template <typename T, typename F>
inline __attribute__((always_inline)) void encode_all(const T* source, const Part& part, const float* scale, int64_t stride, uint8_t* out,
                                                      int64_t out_stride, F value) {
  for (int64_t r = 0; r < part.rows; ++r) {
    const float* of_row = scale + (part.first_row + r) / kBlock * stride;
    const T* from = source + r * part.row_stride;
    uint8_t* to = out + r * out_stride;
    runs(part, [&](int64_t at, int64_t count, int64_t block) __attribute__((always_inline)) {
      const float inverse = 1.0f / of_row[block];
      for (int64_t c = at; c < at + count; ++c) to[c] = encoded(bits_of(value(from[c]) * inverse));
    });
  }
}

TANDEM_WIDE void largest_bf16(const uint16_t* source, const Part& part, uint16_t* columns, float* largest, int64_t stride) {
  largest_of<uint16_t, 16>(source, part, columns, largest, stride);
}

TANDEM_WIDE void largest_fp32(const uint32_t* source, const Part& part, uint32_t* columns, float* largest, int64_t stride) {
  largest_of<uint32_t, 0>(source, part, columns, largest, stride);
}

TANDEM_WIDE void encode_bf16(const uint16_t* source, const Part& part, const float* scale, int64_t stride, uint8_t* out,
                             int64_t out_stride) {
  encode_all(source, part, scale, stride, out, out_stride, [](uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); });
}

TANDEM_WIDE void encode_fp32(const float* source, const Part& part, const float* scale, int64_t stride, uint8_t* out,
                             int64_t out_stride) {
  encode_all(source, part, scale, stride, out, out_stride, [](float x) { return x; });
}

}  // namespace

extern "C" int tandem_largest_magnitudes(const void* source, int is_bf16, int64_t rows, int64_t columns, int64_t row_stride,
                                         int64_t first_row, int64_t first_column, float* largest, int64_t blocks_stride) {
  const Part part{rows, columns, row_stride, first_row, first_column};
  if (is_bf16) {
    std::vector<uint16_t> of_columns(columns);
    largest_bf16(static_cast<const uint16_t*>(source), part, of_columns.data(), largest, blocks_stride);
  } else {
    std::vector<uint32_t> of_columns(columns);
    largest_fp32(static_cast<const uint32_t*>(source), part, of_columns.data(), largest, blocks_stride);
  }
  return 0;
}

extern "C" int tandem_encode_blocks(const void* source, int is_bf16, int64_t rows, int64_t columns, int64_t row_stride, int64_t first_row,
                                    int64_t first_column, const float* scale, int64_t blocks_stride, uint8_t* out, int64_t out_stride) {
  const Part part{rows, columns, row_stride, first_row, first_column};
  if (is_bf16) {
    encode_bf16(static_cast<const uint16_t*>(source), part, scale, blocks_stride, out, out_stride);
  } else {
    encode_fp32(static_cast<const float*>(source), part, scale, blocks_stride, out, out_stride);
  }
  return 0;
}

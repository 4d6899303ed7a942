// matrix.metal for tensor cores: the same pieces and functions in the layout of mma.m16n8k16. float
// operands are multiplied with fused multiply-adds, since tensor cores would round them to tf32.
#define MATRIX_PIECES
#define KEY_ROWS 1
#define VALUE_ROWS 4
#define ROW_LANES_A 1
#define ROW_LANES_B 2

template <typename T> struct Left {
  uint part[4];
};
template <> struct Left<float> {
  float2 part[4];
};
template <typename T> struct Right {
  uint part[2];
};
template <> struct Right<float> {
  float2 part[2];
};
struct Sums {
  float2 part[2];
};

METAL_FUNC int piece_row(uint lane) {
  return int(lane / 4);
}

METAL_FUNC int piece_column(uint lane) {
  return int(lane % 4) * 2;
}

METAL_FUNC int key_row(uint lane, int) {
  return int(lane / 4);
}

METAL_FUNC int value_row(uint lane, int i) {
  return int(lane % 4) * 2 + i % 2 + i / 2 * 8;
}

template <typename T> METAL_FUNC uint pack_pair(T low, T high) {
  return uint(as_type<ushort>(low)) | uint(as_type<ushort>(high)) << 16;
}

METAL_FUNC void set_left(Left<half>& left, int part, float2 pair) {
  left.part[part] = as_type<uint>(__floats2half2_rn(pair.x, pair.y));
}

METAL_FUNC void set_left(Left<bfloat>& left, int part, float2 pair) {
  left.part[part] = as_type<uint>(__floats2bfloat162_rn(pair.x, pair.y));
}

METAL_FUNC void set_left(Left<float>& left, int part, float2 pair) {
  left.part[part] = pair;
}

#define LEFT_WORDS 1
template <typename T> using StoredLeft = Left<T>;

template <typename T> METAL_FUNC void put_left(Left<T>* stored, const Left<T>& left) {
  *stored = left;
}

template <typename T> METAL_FUNC void take_left(Left<T>& left, const Left<T>* stored) {
  left = *stored;
}

template <typename T> METAL_FUNC uint load_pair(const T* source) {
  return *reinterpret_cast<const uint*>(source);
}

template <typename T>
METAL_FUNC void load_left(Left<T>& left, const T* row, const T* below, int column, uint lane) {
  const int at = column + piece_column(lane);
  left.part[0] = load_pair(row + at);
  left.part[1] = load_pair(below + at);
  left.part[2] = load_pair(row + at + 8);
  left.part[3] = load_pair(below + at + 8);
}

template <typename S>
METAL_FUNC void load_left_as_float(
    Left<float>& left, const S* row, const S* below, int column, uint lane) {
  const int at = column + piece_column(lane);
  left.part[0] = float2(float(row[at]), float(row[at + 1]));
  left.part[1] = float2(float(below[at]), float(below[at + 1]));
  left.part[2] = float2(float(row[at + 8]), float(row[at + 9]));
  left.part[3] = float2(float(below[at + 8]), float(below[at + 9]));
}

template <typename T>
METAL_FUNC void load_keys(Right<T>& right, const T* const* rows, int column, uint lane) {
  const int at = column + piece_column(lane);
  right.part[0] = load_pair(rows[0] + at);
  right.part[1] = load_pair(rows[0] + at + 8);
}

template <typename S>
METAL_FUNC void load_keys_as_float(
    Right<float>& right, const S* const* rows, int column, uint lane) {
  const int at = column + piece_column(lane);
  right.part[0] = float2(float(rows[0][at]), float(rows[0][at + 1]));
  right.part[1] = float2(float(rows[0][at + 8]), float(rows[0][at + 9]));
}

template <typename T>
METAL_FUNC void load_values(Right<T>& right, const T* const* rows, int column, uint lane) {
  const int at = column + piece_row(lane);
  right.part[0] = pack_pair(rows[0][at], rows[1][at]);
  right.part[1] = pack_pair(rows[2][at], rows[3][at]);
}

template <typename S>
METAL_FUNC void load_values_as_float(
    Right<float>& right, const S* const* rows, int column, uint lane) {
  const int at = column + piece_row(lane);
  right.part[0] = float2(float(rows[0][at]), float(rows[1][at]));
  right.part[1] = float2(float(rows[2][at]), float(rows[3][at]));
}

// Operands that are multiplied as float may come from memory of any type.
#define LOAD_AS_FLOAT(S)                                                                           \
  METAL_FUNC void load_left(                                                                       \
      Left<float>& left, const S* row, const S* below, int column, uint lane) {                    \
    load_left_as_float(left, row, below, column, lane);                                            \
  }                                                                                                \
  METAL_FUNC void load_keys(Right<float>& right, const S* const* rows, int column, uint lane) {    \
    load_keys_as_float(right, rows, column, lane);                                                 \
  }                                                                                                \
  METAL_FUNC void load_values(Right<float>& right, const S* const* rows, int column, uint lane) {  \
    load_values_as_float(right, rows, column, lane);                                               \
  }
LOAD_AS_FLOAT(float)
LOAD_AS_FLOAT(half)
LOAD_AS_FLOAT(bfloat)
#undef LOAD_AS_FLOAT

#define MMA_16_8_16(T, name)                                                                       \
  METAL_FUNC void multiply_add(Sums& sums, const Left<T>& left, const Right<T>& right) {           \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                     \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                     \
        : "+f"(sums.part[0].e[0]), "+f"(sums.part[0].e[1]), "+f"(sums.part[1].e[0]),               \
          "+f"(sums.part[1].e[1])                                                                  \
        : "r"(left.part[0]), "r"(left.part[1]), "r"(left.part[2]), "r"(left.part[3]),              \
          "r"(right.part[0]), "r"(right.part[1]));                                                 \
  }
MMA_16_8_16(half, "f16")
MMA_16_8_16(bfloat, "bf16")
#undef MMA_16_8_16

METAL_FUNC void multiply_add(Sums& sums, const Left<float>& left, const Right<float>& right) {
  const uint lane = msl_index() % 32;
#pragma unroll
  for (int k = 0; k < 16; k++) {
    const ushort row_holder = ushort(lane / 4 * 4 + k % 8 / 2);
    const float upper = simd_shuffle(left.part[k / 8 * 2][k % 2], row_holder);
    const float lower = simd_shuffle(left.part[k / 8 * 2 + 1][k % 2], row_holder);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const ushort holder = ushort((lane % 4 * 2 + i) * 4 + k % 8 / 2);
      const float value = simd_shuffle(right.part[k / 8][k % 2], holder);
      sums.part[0][i] += upper * value;
      sums.part[1][i] += lower * value;
    }
  }
}

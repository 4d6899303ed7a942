// Matrices spread over the lanes of a simdgroup: a left operand of 16 x 16, a right one of 16 x 8 and
// sums of 16 x 8, in parts of 8 x 8 with two neighbouring elements of a row in each lane. A dialect
// with matrix units of another shape defines MATRIX_PIECES and brings its own version of this file.
#ifndef MATRIX_PIECES
#define MATRIX_PIECES

#define KEY_ROWS 2    // rows of a lane's elements in a right operand that is the transpose of memory
#define VALUE_ROWS 2  // rows of a lane's elements in a right operand that lies as in memory
#define ROW_LANES_A 1 // lanes that differ in these bits hold elements of the same row
#define ROW_LANES_B 8

template <typename T> struct Left {
  float2 part[4];  // rows, 8 rows below; then the same 8 columns further
};
template <typename T> struct Right {
  float2 part[2];
};
struct Sums {
  float2 part[2];  // rows, 8 rows below
};

// Where the two elements of a lane stand in a part of 8 x 8.
METAL_FUNC int piece_row(uint lane) {
  return int(lane / 4 & 4) + int(lane / 2 % 4);
}

METAL_FUNC int piece_column(uint lane) {
  return int(lane / 4 & 2) * 2 + int(lane % 2) * 2;
}

METAL_FUNC int key_row(uint lane, int i) {
  return piece_column(lane) + i;
}

METAL_FUNC int value_row(uint lane, int i) {
  return piece_row(lane) + 8 * i;
}

template <typename T>
METAL_FUNC void set_left(thread Left<T>& left, int part, float2 pair) {
  left.part[part] = pair;
}

// A lane's part of a left operand in threadgroup memory, for another simdgroup.
#define LEFT_WORDS 8
template <typename T> using StoredLeft = float;

template <typename T>
METAL_FUNC void put_left(threadgroup float* words, thread const Left<T>& left) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    words[2 * i] = left.part[i].x;
    words[2 * i + 1] = left.part[i].y;
  }
}

template <typename T>
METAL_FUNC void take_left(thread Left<T>& left, const threadgroup float* words) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    left.part[i] = float2(words[2 * i], words[2 * i + 1]);
  }
}

// Columns column..column + 15 of the rows piece_row and piece_row + 8.
template <typename T, typename S>
METAL_FUNC void load_left(
    thread Left<T>& left, const device S* row, const device S* below, int column, uint lane) {
  const int at = column + piece_column(lane);
  left.part[0] = float2(float(row[at]), float(row[at + 1]));
  left.part[1] = float2(float(below[at]), float(below[at + 1]));
  left.part[2] = float2(float(row[at + 8]), float(row[at + 9]));
  left.part[3] = float2(float(below[at + 8]), float(below[at + 9]));
}

// right[k][n] = row n, column + k.
template <typename T, typename S>
METAL_FUNC void load_keys(
    thread Right<T>& right, const device S* const thread* rows, int column, uint lane) {
  const int at = column + piece_row(lane);
  right.part[0] = float2(float(rows[0][at]), float(rows[1][at]));
  right.part[1] = float2(float(rows[0][at + 8]), float(rows[1][at + 8]));
}

// right[k][n] = row k, column + n.
template <typename T, typename S>
METAL_FUNC void load_values(
    thread Right<T>& right, const device S* const thread* rows, int column, uint lane) {
  const int at = column + piece_column(lane);
  right.part[0] = float2(float(rows[0][at]), float(rows[0][at + 1]));
  right.part[1] = float2(float(rows[1][at]), float(rows[1][at + 1]));
}

template <typename T>
METAL_FUNC void multiply_add(
    thread Sums& sums, thread const Left<T>& left, thread const Right<T>& right) {
  simdgroup_matrix<float, 8, 8> a;
  simdgroup_matrix<float, 8, 8> b;
  simdgroup_matrix<float, 8, 8> c;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    reinterpret_cast<thread float2&>(c.thread_elements()) = sums.part[i];
#pragma unroll
    for (int k = 0; k < 2; k++) {
      reinterpret_cast<thread float2&>(a.thread_elements()) = left.part[2 * k + i];
      reinterpret_cast<thread float2&>(b.thread_elements()) = right.part[k];
      simdgroup_multiply_accumulate(c, a, b, c);
    }
    sums.part[i] = reinterpret_cast<thread float2&>(c.thread_elements());
  }
}

#endif

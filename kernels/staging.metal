// Tiles of rows in threadgroup memory, for products that many simdgroups share. Stands after
// matrix.metal, whose pieces are the operands that stay in registers. A dialect with other means
// (copies that do not wait, products that do not wait, a layout that its matrix units read) defines
// STAGED_TILES and brings its own version of the first half.
//
// What is started may still run when the function returns: `stage_wait` and `finish` wait for it, and
// only then may a tile be read (after a barrier too), a tile or weights be overwritten, or sums be used.
// All simdgroups of four neighbouring row tiles start products together.
#ifndef STAGED_TILES
#define STAGED_TILES

// Rows lie 16 bytes further apart than they are long, so that a column is spread over the banks.
template <typename T, int DIM> METAL_FUNC constexpr int tile_pitch() {
  return DIM + 16 / int(sizeof(T));
}

// Elements that a tile takes.
template <typename T, int DIM> METAL_FUNC constexpr int tile_elements(int rows) {
  return rows * tile_pitch<T, DIM>();
}

// Where 16 bytes of a row stand in a tile of ROWS rows.
template <typename T, int DIM, int ROWS> METAL_FUNC int tile_place(int row, int vector) {
  return row * tile_pitch<T, DIM>() + vector * (16 / int(sizeof(T)));
}

// Copies 16 bytes.
template <typename T> METAL_FUNC void stage_vector(threadgroup T* target, const device T* source) {
  *reinterpret_cast<threadgroup uint4*>(target) = *reinterpret_cast<const device uint4*>(source);
}

// Ends a batch of copies.
METAL_FUNC void stage_commit() {}

// Waits until at most PENDING batches of this thread's copies are under way.
template <int PENDING> METAL_FUNC void stage_wait() {}

template <typename T, int DIM>
METAL_FUNC float2 tile_pair(const threadgroup T* tile, int row, int column) {
  const threadgroup T* found = tile + row * tile_pitch<T, DIM>() + column;
  return float2(float(found[0]), float(found[1]));
}

// sums[n] = 16 rows of a tile of queries times 8 keys each, from first_key on.
template <typename T, int DIM, int ROWS, int TILE, int PIECES>
METAL_FUNC void start_scores(
    thread Sums* sums,
    const threadgroup T* queries,
    int row_tile,
    const threadgroup T* keys,
    int first_key,
    uint lane) {
#pragma unroll
  for (int n = 0; n < PIECES; n++) {
    sums[n].part[0] = float2(0.0f, 0.0f);
    sums[n].part[1] = float2(0.0f, 0.0f);
  }
  for (int k = 0; k < DIM / 16; k++) {
    Left<T> query;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      query.part[i] = tile_pair<T, DIM>(
          queries, row_tile * 16 + piece_row(lane) + i % 2 * 8, 16 * k + piece_column(lane) + i / 2 * 8);
    }
#pragma unroll
    for (int n = 0; n < PIECES; n++) {
      Right<T> right;
      const threadgroup T* upper = keys + (first_key + 8 * n + key_row(lane, 0)) * tile_pitch<T, DIM>();
      const threadgroup T* lower = keys + (first_key + 8 * n + key_row(lane, 1)) * tile_pitch<T, DIM>();
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int column = 16 * k + piece_row(lane) + 8 * i;
        right.part[i] = float2(float(upper[column]), float(lower[column]));
      }
      multiply_add(sums[n], query, right);
    }
  }
}

// sums[d] += weights of the tile's keys times 8 columns each, from first_column on. PITCH: how wide a
// row of the tile is.
template <typename T, int PITCH, int TILE, int PIECES>
METAL_FUNC void start_values(
    thread Sums* sums,
    thread const Left<T>* weights,
    const threadgroup T* values,
    int first_column,
    uint lane) {
#pragma unroll
  for (int d = 0; d < PIECES; d++) {
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) {
      Right<T> right;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        right.part[i] = tile_pair<T, PITCH>(
            values, 16 * k + value_row(lane, i), first_column + 8 * d + piece_column(lane));
      }
      multiply_add(sums[d], weights[k], right);
    }
  }
}

// Waits until at most PENDING products are under way; `sums` are those of the last that ended.
template <int PENDING, int PIECES> METAL_FUNC void finish(thread Sums* sums) {}

// What was worked out from sums is there now: none of it is left for later, when nothing runs beside it.
template <int PIECES> METAL_FUNC void settle(thread Sums* sums) {}

template <typename T> METAL_FUNC void store_pair(device T* target, float2 pair) {
  target[0] = static_cast<T>(pair.x);
  target[1] = static_cast<T>(pair.y);
}

#endif

// The block of a tile's keys that this lane looks up, the lane'th of them; blocks that hold none of the
// keys low..high are not looked up.
template <int BLOCK>
METAL_FUNC int tile_block(const device int* table, int first, int low, int high, uint lane) {
  return table[clamp(first / BLOCK + int(lane), low / BLOCK, high / BLOCK)];
}

// Rows of one head into a tile of TILE rows, 8 threads for 128 bytes of a row. Keys outside low..high
// repeat the nearest one inside, so that whatever lies in the rest of a block is never read.
// block: as `tile_block` found it.
template <typename T, int DIM, int TILE, int BLOCK, int HEADS, int THREADS>
METAL_FUNC void stage_keys(
    threadgroup T* target,
    const device T* pool,
    int block,
    int head,
    int first,
    int low,
    int high,
    int thread_index) {
  static_assert(TILE / BLOCK < 32, "a lane for each block");
  constexpr int VECTOR = 16 / int(sizeof(T));
  constexpr int VECTORS = DIM / VECTOR;
#pragma unroll
  for (int step = 0; step < (TILE * 8 + THREADS - 1) / THREADS; step++) {
    const int row = step * (THREADS / 8) + thread_index / 8;
    const int key = clamp(first + row, low, high);
    const int found = simd_shuffle(block, ushort(min(key / BLOCK - first / BLOCK, 31)));
    const device T* source = pool + (size_t(found * BLOCK + key % BLOCK) * HEADS + head) * DIM;
    if (TILE * 8 % THREADS == 0 || row < TILE) {
#pragma unroll
      for (int panel = 0; panel < VECTORS; panel += 8) {
        const int vector = panel + thread_index % 8;
        if (panel + 8 <= VECTORS || vector < VECTORS) {
          stage_vector(target + tile_place<T, DIM, TILE>(row, vector), source + vector * VECTOR);
        }
      }
    }
  }
}

// Packed rows of queries into a tile of ROWS rows; those past the end repeat the last.
template <typename T, int DIM, int ROWS, int HEADS, int GROUP, int THREADS>
METAL_FUNC void stage_queries(
    threadgroup T* target,
    const device T* queries,
    int first_row,
    int kv_head,
    int packed,
    int packed_end,
    int thread_index) {
  constexpr int VECTOR = 16 / int(sizeof(T));
  constexpr int VECTORS = DIM / VECTOR;
#pragma unroll
  for (int step = 0; step < (ROWS * 8 + THREADS - 1) / THREADS; step++) {
    const int row = step * (THREADS / 8) + thread_index / 8;
    const int used = min(packed + row, packed_end - 1);
    const device T* source = queries
        + (size_t(first_row + used / GROUP) * (HEADS * GROUP) + kv_head * GROUP + used % GROUP) * DIM;
    if (ROWS * 8 % THREADS == 0 || row < ROWS) {
#pragma unroll
      for (int panel = 0; panel < VECTORS; panel += 8) {
        const int vector = panel + thread_index % 8;
        if (panel + 8 <= VECTORS || vector < VECTORS) {
          stage_vector(target + tile_place<T, DIM, ROWS>(row, vector), source + vector * VECTOR);
        }
      }
    }
  }
}

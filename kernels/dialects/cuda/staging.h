// staging.metal for tensor cores: a tile lies in panels of 64 columns, whose rows are 128 bytes with the
// 16-byte words of row r permuted by r % 8. On Hopper products are those of a warpgroup (wgmma, which reads
// tiles by descriptors and does not wait), elsewhere those of a warp (ldmatrix, mma). 16-bit types only.
#define STAGED_TILES

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(MSL_WARP_PRODUCTS)
#define MSL_WGMMA 1
#else
#define MSL_WGMMA 0
#endif

template <typename T, int DIM> METAL_FUNC constexpr int tile_pitch() {
  return (DIM + 63) / 64 * 64;
}

template <typename T, int DIM> METAL_FUNC constexpr int tile_elements(int rows) {
  return rows * tile_pitch<T, DIM>();
}

template <typename T, int DIM, int ROWS> METAL_FUNC int tile_place(int row, int vector) {
  static_assert(sizeof(T) == 2, "tiles hold 16-bit types");
  return vector / 8 * (ROWS * 64) + row * 64 + (vector % 8 ^ row % 8) * 8;
}

METAL_FUNC uint msl_shared(const void* pointer) {
  return uint(__cvta_generic_to_shared(pointer));
}

template <typename T> METAL_FUNC void stage_vector(T* target, const T* source) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(msl_shared(target)), "l"(source));
}

METAL_FUNC void stage_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int PENDING> METAL_FUNC void stage_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#if MSL_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

template <typename T> METAL_FUNC void store_pair(T* target, float2 pair);
template <> METAL_FUNC void store_pair<float>(float* target, float2 pair) {
  *reinterpret_cast<float2*>(target) = pair;
}
template <> METAL_FUNC void store_pair<half>(half* target, float2 pair) {
  *reinterpret_cast<__half2*>(target) = __floats2half2_rn(pair.x, pair.y);
}
template <> METAL_FUNC void store_pair<bfloat>(bfloat* target, float2 pair) {
  *reinterpret_cast<__nv_bfloat162*>(target) = __floats2bfloat162_rn(pair.x, pair.y);
}

#if MSL_WGMMA
// Tells the compiler that registers change here.
template <int PIECES> METAL_FUNC void msl_touch(Sums* sums) {
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    asm volatile("" : "+f"(sums[i].part[0].e[0]), "+f"(sums[i].part[0].e[1]), "+f"(sums[i].part[1].e[0]),
                      "+f"(sums[i].part[1].e[1])::"memory");
  }
}

// Where a matrix starts, the same for all lanes, which the compiler is told by the shuffle; `along` bytes between panels, `across` between groups of 8 rows.
METAL_FUNC ulong msl_matrix(const void* start, uint along, uint across) {
  return ulong(__shfl_sync(0xffffffffu, msl_shared(start), 0) >> 4) | ulong(along >> 4) << 16 | ulong(across >> 4) << 32 |
      ulong(1) << 62;
}

// So many bytes further.
METAL_FUNC constexpr ulong msl_step(int bytes) {
  return ulong(bytes >> 4);
}

METAL_FUNC void msl_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

METAL_FUNC void msl_end() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// The widest product that there is for so many pieces: whole panels, then the rest of one.
METAL_FUNC constexpr int msl_width(int pieces) {
  return pieces >= 32 ? 32 : pieces >= 24 ? 24 : pieces >= 16 ? 16 : pieces >= 8 ? 8 : pieces;
}

// MSL_PRODUCTS
template <typename T, int TILE, int PIECES> struct msl_products {
  static METAL_FUNC void tiles(Sums* sums, ulong left, ulong keys, int add) {
    constexpr int WIDTH = msl_width(PIECES);
    msl_wgmma<T, WIDTH>::tiles(sums, left, keys, add);
    if constexpr (PIECES > WIDTH) {
      msl_products<T, TILE, PIECES - WIDTH>::tiles(sums + WIDTH, left, keys + msl_step(WIDTH * 1024), add);
    }
  }
  static METAL_FUNC void weights(Sums* sums, const Left<T>& left, ulong values) {
    constexpr int WIDTH = msl_width(PIECES);
    msl_wgmma<T, WIDTH>::weights(sums, left, values);
    if constexpr (PIECES > WIDTH) {
      msl_products<T, TILE, PIECES - WIDTH>::weights(
          sums + WIDTH, left, values + msl_step(WIDTH / 8 * (TILE * 128)));
    }
  }
};

template <typename T, int DIM, int ROWS, int TILE, int PIECES>
METAL_FUNC void start_scores(
    Sums* sums, const T* queries, int row_tile, const T* keys, int first_key, uint) {
  static_assert(ROWS % 64 == 0, "row tiles go four by four");
  const ulong left = msl_matrix(queries + row_tile / 4 * (64 * 64), 16, 1024);
  const ulong right = msl_matrix(keys + first_key * 64, 16, 1024);
  msl_touch<PIECES>(sums);
  msl_begin();
#pragma unroll
  for (int k = 0; k < DIM / 16; k++) {
    msl_products<T, TILE, PIECES>::tiles(
        sums,
        left + msl_step(k / 4 * (ROWS * 128) + k % 4 * 32),
        right + msl_step(k / 4 * (TILE * 128) + k % 4 * 32),
        k > 0);
  }
  msl_end();
}

template <typename T, int PITCH, int TILE, int PIECES>
METAL_FUNC void start_values(
    Sums* sums, const Left<T>* weights, const T* values, int first_column, uint) {
  const ulong right = msl_matrix(values + first_column / 64 * (TILE * 64), TILE * 128, 1024);
  msl_touch<PIECES>(sums);
  msl_begin();
#pragma unroll
  for (int k = 0; k < TILE / 16; k++) {
    msl_products<T, TILE, PIECES>::weights(sums, weights[k], right + msl_step(k * 2048));
  }
  msl_end();
}

template <int PIECES> METAL_FUNC void settle(Sums* sums) {
  msl_touch<PIECES>(sums);
}

template <int PENDING, int PIECES> METAL_FUNC void finish(Sums* sums) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
  msl_touch<PIECES>(sums);
}
#else
// Four matrices of 8 x 8, of which lane l names row l % 8 of matrix l / 8.
METAL_FUNC void msl_load_matrices(uint* made, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(made[0]), "=r"(made[1]), "=r"(made[2]), "=r"(made[3])
               : "r"(msl_shared(row))
               : "memory");
}

METAL_FUNC void msl_load_transposed(uint* made, const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(made[0]), "=r"(made[1]), "=r"(made[2]), "=r"(made[3])
               : "r"(msl_shared(row))
               : "memory");
}

template <typename T, int DIM, int ROWS, int TILE, int PIECES>
METAL_FUNC void start_scores(
    Sums* sums, const T* queries, int row_tile, const T* keys, int first_key, uint lane) {
#pragma unroll
  for (int n = 0; n < PIECES; n++) {
    sums[n].part[0] = float2(0.0f, 0.0f);
    sums[n].part[1] = float2(0.0f, 0.0f);
  }
#pragma unroll
  for (int k = 0; k < DIM / 16; k++) {
    Left<T> query;
    msl_load_matrices(
        query.part,
        queries + tile_place<T, DIM, ROWS>(row_tile * 16 + int(lane % 16), 2 * k + int(lane / 16)));
#pragma unroll
    for (int n = 0; n < PIECES; n += 2) {
      uint loaded[4];
      msl_load_matrices(
          loaded,
          keys
              + tile_place<T, DIM, TILE>(
                  first_key + 8 * n + int(lane % 8 + lane / 16 * 8), 2 * k + int(lane / 8 % 2)));
#pragma unroll
      for (int i = 0; i < 2; i++) {
        Right<T> right;
        right.part[0] = loaded[2 * i];
        right.part[1] = loaded[2 * i + 1];
        multiply_add(sums[n + i], query, right);
      }
    }
  }
}

template <typename T, int PITCH, int TILE, int PIECES>
METAL_FUNC void start_values(
    Sums* sums, const Left<T>* weights, const T* values, int first_column, uint lane) {
#pragma unroll
  for (int k = 0; k < TILE / 16; k++) {
#pragma unroll
    for (int d = 0; d < PIECES; d += 2) {
      uint loaded[4];
      msl_load_transposed(
          loaded,
          values
              + tile_place<T, PITCH, TILE>(
                  16 * k + int(lane % 16), first_column / 8 + d + int(lane / 16)));
#pragma unroll
      for (int i = 0; i < 2; i++) {
        Right<T> right;
        right.part[0] = loaded[2 * i];
        right.part[1] = loaded[2 * i + 1];
        multiply_add(sums[d + i], weights[k], right);
      }
    }
  }
}

template <int PIECES> METAL_FUNC void settle(Sums*) {}

template <int PENDING, int PIECES> METAL_FUNC void finish(Sums*) {}
#endif

// Helpers of all kernels. Rows of the pools are read as 32-bit words: one load of up to 16 bytes,
// whose elements are taken apart only where they are used, so that loads in flight stay small.

template <int COUNT> struct Words {
  uint w[COUNT];
};

template <int COUNT> METAL_FUNC Words<COUNT> load_words(const device uint* source);

template <> METAL_FUNC Words<1> load_words<1>(const device uint* source) {
  Words<1> result;
  result.w[0] = source[0];
  return result;
}

template <> METAL_FUNC Words<2> load_words<2>(const device uint* source) {
  const uint2 loaded = *reinterpret_cast<const device uint2*>(source);
  Words<2> result;
  result.w[0] = loaded.x;
  result.w[1] = loaded.y;
  return result;
}

template <> METAL_FUNC Words<4> load_words<4>(const device uint* source) {
  const uint4 loaded = *reinterpret_cast<const device uint4*>(source);
  Words<4> result;
  result.w[0] = loaded.x;
  result.w[1] = loaded.y;
  result.w[2] = loaded.z;
  result.w[3] = loaded.w;
  return result;
}

// Element i of a word, as float.
template <typename T> METAL_FUNC float element(uint word, int i);

template <> METAL_FUNC float element<float>(uint word, int i) {
  return as_type<float>(word);
}

template <> METAL_FUNC float element<float16_t>(uint word, int i) {
  return float(as_type<half2>(word)[i]);
}

template <> METAL_FUNC float element<bfloat16_t>(uint word, int i) {
  return as_type<float>(i == 0 ? word << 16 : word & 0xffff0000u);
}

// One step of scatter_sum: lanes that differ in MASK exchange halves of N values and add them.
template <int N, int MASK> METAL_FUNC void exchange_halves(thread float* values, uint lane) {
  if (MASK == 0) {
    return;
  }
  if (N == 1) {
    values[0] += simd_shuffle_xor(values[0], ushort(MASK));
    return;
  }
  const bool upper = (lane & uint(MASK)) != 0;
#pragma unroll
  for (int i = 0; i < N / 2; i++) {
    const float given = upper ? values[i] : values[i + N / 2];
    const float kept = upper ? values[i + N / 2] : values[i];
    values[i] = kept + simd_shuffle_xor(given, ushort(MASK));
  }
}

// Sums N values over each group of LANES neighbouring lanes (both powers of two, N <= LANES) and
// leaves the sum of value i in the lanes whose index in the group is i * LANES / N or follows it.
// Takes N - 1 + log2(LANES / N) shuffles, where summing value by value takes N * log2(LANES).
template <int N, int LANES> METAL_FUNC float scatter_sum(thread float* values, uint lane) {
  exchange_halves<N, LANES / 2>(values, lane);
  exchange_halves<(N > 2 ? N / 2 : 1), LANES / 4>(values, lane);
  exchange_halves<(N > 4 ? N / 4 : 1), LANES / 8>(values, lane);
  exchange_halves<(N > 8 ? N / 8 : 1), LANES / 16>(values, lane);
  exchange_halves<(N > 16 ? N / 16 : 1), LANES / 32>(values, lane);
  return values[0];
}

// The blocks of a tile of keys; blocks that hold none of the keys low..high are not looked up.
template <int TILE, int BLOCK>
METAL_FUNC void tile_blocks(
    thread int* blocks, const device int* table, int tile, int low, int high) {
#pragma unroll
  for (int i = 0; i < (TILE > BLOCK ? TILE / BLOCK : 1); i++) {
    blocks[i] = table[clamp(tile / BLOCK + i, low / BLOCK, high / BLOCK)];
  }
}

// Rows of one head for a tile of TILE keys, STEPS at a time: LANES lanes share a row, each holding
// LOADS vectors of WORDS words, LANES vectors apart. Keys outside low..high repeat the nearest one
// inside, so that whatever lies in the rest of a block is never read. BLOCK_WORDS: from one block to
// the next.
template <
    int DIM,
    int VECTOR,
    int WORDS,
    int LANES,
    int LOADS,
    int TILE,
    int BLOCK,
    int HEADS,
    int BLOCK_WORDS>
METAL_FUNC void load_tile(
    thread Words<WORDS>* rows,
    const device uint* pool,
    thread const int* blocks,
    int head,
    int tile,
    int low,
    int high,
    uint lane) {
  constexpr int VECTORS = DIM / VECTOR;
  constexpr int ROWS = 32 / LANES;
#pragma unroll
  for (int step = 0; step < TILE / ROWS; step++) {
    const int key = clamp(tile + step * ROWS + int(lane) / LANES, low, high);
    const device uint* row = pool
        + size_t(blocks[TILE > BLOCK ? step * ROWS / BLOCK : 0]) * BLOCK_WORDS
        + (key % BLOCK * HEADS + head) * (VECTORS * WORDS);
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      const int vector = int(lane) % LANES + i * LANES;
      if (vector < VECTORS) {
        rows[step * LOADS + i] = load_words<WORDS>(row + vector * WORDS);
      } else {
#pragma unroll
        for (int j = 0; j < WORDS; j++) {
          rows[step * LOADS + i].w[j] = 0;
        }
      }
    }
  }
}

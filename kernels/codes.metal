// Pools of codes: BITS bits each, the lowest bits of a word first, and for every GROUP of them along a
// row a scale and a bias, value = scale * code + bias. Codes and pairs are those of mx.quantize.
//
// A block holds the codes of its rows, [BLOCK, HEADS, DIM * BITS / 32] words, then their pairs,
// [HEADS, BLOCK, DIM / GROUP, 2] of type P: a head's pairs lie side by side, since few bytes of each
// row are pairs and memory moves in longer pieces.
template <typename P, int HEADS, int DIM, int BLOCK, int BITS, int GROUP>
METAL_FUNC constexpr int block_words() {
  return BLOCK * HEADS * (DIM * BITS / 32 + DIM / GROUP * int(sizeof(P)) / 2);
}

// Where the pairs of a row begin, in words of the block.
template <typename P, int HEADS, int DIM, int BLOCK, int BITS, int GROUP>
METAL_FUNC int pair_start(int head, int row) {
  return BLOCK * HEADS * (DIM * BITS / 32)
      + (head * BLOCK + row) * (DIM / GROUP * int(sizeof(P)) / 2);
}

// Value i of a word, given the scale and the bias of its group in PAIR words.
template <typename P, int PAIR, int BITS>
METAL_FUNC float decoded(uint word, int i, Words<PAIR> pair) {
  const float scale = element<P>(pair.w[0], 0);
  const float bias = element<P>(pair.w[PAIR - 1], PAIR == 1 ? 1 : 0);
  return scale * float((word >> (BITS * i)) & ((1u << BITS) - 1u)) + bias;
}

// The pairs for what load_tile loads with the same arguments.
template <
    int PAIR,
    int DIM,
    int VECTOR,
    int GROUP,
    int LANES,
    int LOADS,
    int TILE,
    int BLOCK,
    int HEADS,
    int BLOCK_WORDS>
METAL_FUNC void load_pairs(
    thread Words<PAIR>* pairs,
    const device uint* pool,
    thread const int* blocks,
    int head,
    int tile,
    int low,
    int high,
    uint lane) {
  constexpr int ROWS = 32 / LANES;
  constexpr int ROW = DIM / GROUP * PAIR;
#pragma unroll
  for (int step = 0; step < TILE / ROWS; step++) {
    const int key = clamp(tile + step * ROWS + int(lane) / LANES, low, high);
    const device uint* row = pool
        + size_t(blocks[TILE > BLOCK ? step * ROWS / BLOCK : 0]) * BLOCK_WORDS
        + (BLOCK_WORDS - HEADS * BLOCK * ROW) + (head * BLOCK + key % BLOCK) * ROW;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      const int vector = min(int(lane) % LANES + i * LANES, DIM / VECTOR - 1);
      pairs[step * LOADS + i] = load_words<PAIR>(row + vector * VECTOR / GROUP * PAIR);
    }
  }
}

// Puts one row of HEADS heads into its slot: a lane for each word of codes, THREADS of them.
template <
    typename R,
    typename P,
    int HEADS,
    int DIM,
    int BLOCK,
    int BITS,
    int GROUP,
    int THREADS>
METAL_FUNC void quantize_row(
    const device R* source, device uint* pool, int slot, int thread_index) {
  constexpr int PER_WORD = 32 / BITS;
  constexpr int ROW = DIM / PER_WORD;      // words of a head
  constexpr int LANES = GROUP / PER_WORD;  // words of a group
  constexpr int WORDS = HEADS * ROW;
  constexpr float HIGHEST = float((1u << BITS) - 1u);
  device uint* block =
      pool + size_t(slot / BLOCK) * block_words<P, HEADS, DIM, BLOCK, BITS, GROUP>();
  const int row = slot % BLOCK;
  for (int first = 0; first < WORDS; first += THREADS) {
    // Lanes beyond the row's words repeat the last one: all lanes take part in the shuffles.
    const int word = min(first + thread_index, WORDS - 1);
    float values[PER_WORD];
    float low = INFINITY;
    float high = -INFINITY;
#pragma unroll
    for (int i = 0; i < PER_WORD; i++) {
      values[i] = static_cast<float>(source[word * PER_WORD + i]);
      low = min(low, values[i]);
      high = max(high, values[i]);
    }
#pragma unroll
    for (int distance = 1; distance < LANES; distance *= 2) {
      low = min(low, simd_shuffle_xor(low, ushort(distance)));
      high = max(high, simd_shuffle_xor(high, ushort(distance)));
    }
    // The end of the range that is further from zero is kept exactly, and zero nearly so.
    const bool below = fabs(low) > fabs(high);
    const float edge = below ? low : high;
    float scale = max((high - low) / HIGHEST, 1e-7f);
    scale = below ? scale : -scale;
    const float steps = rint(edge / scale);
    float bias = 0.0f;
    if (steps != 0.0f) {
      scale = edge / steps;
      bias = edge;
    }
    uint codes = 0;
#pragma unroll
    for (int i = 0; i < PER_WORD; i++) {
      const float code = min(max(rint((values[i] - bias) / scale), 0.0f), HIGHEST);
      codes |= uint(code) << (BITS * i);
    }
    if (first + thread_index < WORDS) {
      block[row * WORDS + word] = codes;
      if (word % LANES == 0) {
        device P* pair = reinterpret_cast<device P*>(
            block + pair_start<P, HEADS, DIM, BLOCK, BITS, GROUP>(word / ROW, row));
        pair[word % ROW / LANES * 2] = static_cast<P>(scale);
        pair[word % ROW / LANES * 2 + 1] = static_cast<P>(bias);
      }
    }
  }
}

// Copies one row of HEADS heads out of its slot, as values: to target[head, position] of `length`.
template <typename P, int HEADS, int DIM, int BLOCK, int BITS, int GROUP, int THREADS>
METAL_FUNC void dequantize_row(
    const device uint* pool,
    device P* target,
    int slot,
    int position,
    size_t length,
    int thread_index) {
  constexpr int PER_WORD = 32 / BITS;
  constexpr int ROW = DIM / PER_WORD;
  constexpr int LANES = GROUP / PER_WORD;
  constexpr int PAIR = int(sizeof(P)) / 2;
  const device uint* block =
      pool + size_t(slot / BLOCK) * block_words<P, HEADS, DIM, BLOCK, BITS, GROUP>();
  const int row = slot % BLOCK;
  for (int word = thread_index; word < HEADS * ROW; word += THREADS) {
    const int head = word / ROW;
    const uint codes = block[row * (HEADS * ROW) + word];
    const Words<PAIR> pair = load_words<PAIR>(
        block + pair_start<P, HEADS, DIM, BLOCK, BITS, GROUP>(head, row) + word % ROW / LANES * PAIR);
    device P* values = target + (size_t(head) * length + position) * DIM + word % ROW * PER_WORD;
#pragma unroll
    for (int i = 0; i < PER_WORD; i++) {
      values[i] = static_cast<P>(decoded<P, PAIR, BITS>(codes, i, pair));
    }
  }
}

// The part of the Metal Shading Language that needs other threads: SIMD-group functions, barriers,
// matrices, atomics and threadgroup memory are calls into runtime.cpp. Each call carries the line it
// stands on, for reports and to tell diverging threads apart.
#pragma once
#include "msl_types.h"

extern "C" {
void msl_reduce(void* value, int type, int operation, int line);
void msl_shuffle(void* value, int bytes, int source, int kind, int line);
uint64_t msl_ballot(int vote, int line);
void msl_barrier(int flags, int line);
void msl_simd_barrier(int flags, int line);
void msl_multiply(float* d, const float* a, const float* b, const float* c, int line);
void msl_together(int kind, int line);
unsigned msl_lane(void);
void msl_atomic(const volatile void* address, int bytes, int kind, int line);
void* msl_threadgroup(int id, size_t bytes, size_t align, int element, const char* name, int line);
}

// The numbers below are those of runtime.cpp.
namespace metal {
#define MSL_LINE int line = __builtin_LINE()
template <class T>
struct msl_type;
#define MSL_TYPE(T, n)                                                                             \
  template <>                                                                                      \
  struct msl_type<T> {                                                                             \
    static constexpr int number = n;                                                               \
  };
// No 64-bit types: Metal has no SIMD-group functions for them.
MSL_TYPE(float, 0)
MSL_TYPE(half, 1)
MSL_TYPE(bfloat, 2)
MSL_TYPE(int, 3)
MSL_TYPE(uint, 4)
MSL_TYPE(short, 5)
MSL_TYPE(ushort, 6)
MSL_TYPE(char, 7)
MSL_TYPE(signed char, 7)
MSL_TYPE(uchar, 8)
#undef MSL_TYPE

#define MSL_REDUCTION(name, operation)                                                             \
  template <class T>                                                                               \
  MSL_FN T name(T x, MSL_LINE) {                                                                   \
    msl_reduce(&x, msl_type<T>::number, operation, line);                                          \
    return x;                                                                                      \
  }                                                                                                \
  template <class T, int N>                                                                        \
  MSL_FN vec<T, N> name(vec<T, N> x, MSL_LINE) {                                                   \
    for (int i = 0; i < N; i++) msl_reduce(&x.e[i], msl_type<T>::number, operation, line);         \
    return x;                                                                                      \
  }
MSL_REDUCTION(simd_sum, 0)
MSL_REDUCTION(simd_max, 1)
MSL_REDUCTION(simd_min, 2)
MSL_REDUCTION(simd_product, 3)
MSL_REDUCTION(simd_and, 4)
MSL_REDUCTION(simd_or, 5)
MSL_REDUCTION(simd_xor, 6)
MSL_REDUCTION(simd_prefix_inclusive_sum, 7)
MSL_REDUCTION(simd_prefix_exclusive_sum, 8)
MSL_REDUCTION(simd_prefix_inclusive_product, 9)
MSL_REDUCTION(simd_prefix_exclusive_product, 10)
#undef MSL_REDUCTION

template <class T>
struct msl_shuffled {
  static_assert(is_vector<T>::value || sizeof(T) <= 4,
                "SIMD-group functions take no 64-bit scalars");
};
#define MSL_SHUFFLE(name, parameter, source, kind)                                                 \
  template <class T>                                                                               \
  MSL_FN T name(T x, parameter, MSL_LINE) {                                                        \
    (void)sizeof(msl_shuffled<T>);                                                                 \
    msl_shuffle(&x, sizeof(T), source, kind, line);                                                \
    return x;                                                                                      \
  }
MSL_SHUFFLE(simd_shuffle, ushort lane, lane, 0)
MSL_SHUFFLE(simd_broadcast, ushort lane, lane, 1)
MSL_SHUFFLE(simd_shuffle_xor, ushort mask, int(msl_lane() ^ mask), 3)
MSL_SHUFFLE(simd_shuffle_down, ushort delta, int(msl_lane() + delta), 4)
MSL_SHUFFLE(simd_shuffle_up, ushort delta, int(msl_lane()) - int(delta), 5)
MSL_SHUFFLE(simd_shuffle_rotate_down, ushort delta, int((msl_lane() + delta) % 32), 0)
MSL_SHUFFLE(simd_shuffle_rotate_up, ushort delta, int((msl_lane() + 32 - delta % 32) % 32), 0)
MSL_SHUFFLE(quad_shuffle, ushort lane, int(msl_lane() / 4 * 4 + lane), 6)
MSL_SHUFFLE(quad_broadcast, ushort lane, int(msl_lane() / 4 * 4 + lane), 6)
MSL_SHUFFLE(quad_shuffle_xor, ushort mask, int(msl_lane() ^ mask), 6)
#undef MSL_SHUFFLE
template <class T>
MSL_FN T simd_broadcast_first(T x, MSL_LINE) {
  (void)sizeof(msl_shuffled<T>);
  msl_shuffle(&x, sizeof(T), -1, 2, line);
  return x;
}
template <class T>
MSL_FN T simd_shuffle_and_fill_up(T x, T fill, ushort delta, MSL_LINE) {
  const int source = int(msl_lane()) - int(delta);
  msl_shuffle(&x, sizeof(T), source < 0 ? 0 : source, 5, line);
  return source < 0 ? fill : x;
}
template <class T>
MSL_FN T simd_shuffle_and_fill_down(T x, T fill, ushort delta, MSL_LINE) {
  const int source = int(msl_lane()) + int(delta);
  msl_shuffle(&x, sizeof(T), source > 31 ? 31 : source, 4, line);
  return source > 31 ? fill : x;
}
#define MSL_QUAD(name, expression)                                                                 \
  template <class T>                                                                               \
  MSL_FN T name(T x, MSL_LINE) {                                                                   \
    T y = quad_shuffle_xor(x, 1, line);                                                            \
    x = expression;                                                                                \
    y = quad_shuffle_xor(x, 2, line);                                                              \
    return expression;                                                                             \
  }
MSL_QUAD(quad_sum, T(x + y))
MSL_QUAD(quad_max, max(x, y))
MSL_QUAD(quad_min, min(x, y))
#undef MSL_QUAD
MSL_FN bool simd_any(bool vote, MSL_LINE) {
  return msl_ballot(vote, line) != 0;
}
MSL_FN bool simd_all(bool vote, MSL_LINE) {
  return msl_ballot(!vote, line) == 0;
}
MSL_FN bool simd_is_first(MSL_LINE) {
  msl_together(20, line);
  return msl_lane() == 0;
}
struct simd_vote {
  typedef uint64_t vote_t;
  uint64_t votes;
  MSL_FN explicit operator vote_t() const { return votes; }
  MSL_FN bool all() const { return (votes & 0xffffffffu) == 0xffffffffu; }
  MSL_FN bool any() const { return votes != 0; }
};
MSL_FN simd_vote simd_ballot(bool vote, MSL_LINE) {
  return simd_vote{msl_ballot(vote, line)};
}

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
MSL_FN constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}
MSL_FN void threadgroup_barrier(mem_flags flags, MSL_LINE) {
  msl_barrier(int(flags), line);
}
MSL_FN void simdgroup_barrier(mem_flags flags, MSL_LINE) {
  msl_simd_barrier(int(flags), line);
}

// ---- 8x8 matrices: two neighbours of one row per lane, laid out as MLX's own kernels expect ------
MSL_FN uint msl_row(uint lane) {
  return (lane / 4 & 4) + lane / 2 % 4;
}
MSL_FN uint msl_column(uint lane) {
  return (lane / 4 & 2) * 2 + lane % 2 * 2;
}
template <class T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "simdgroup_matrix is 8x8");
  vec<T, 2> elements;
  simdgroup_matrix() = default;
  MSL_FN explicit simdgroup_matrix(T diagonal) {
    const uint row = msl_row(msl_lane()), column = msl_column(msl_lane());
    elements.e[0] = row == column ? diagonal : T(0);
    elements.e[1] = row == column + 1 ? diagonal : T(0);
  }
  MSL_FN vec<T, 2>& thread_elements() { return elements; }
  MSL_FN const vec<T, 2>& thread_elements() const { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class T, int R, int C = R>
MSL_FN simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T x) {
  simdgroup_matrix<T, R, C> m;
  m.elements = vec<T, 2>(x);
  return m;
}
template <class T, int R, int C = R>
MSL_FN simdgroup_matrix<T, R, C> make_diagonal_simdgroup_matrix(T x) {
  return simdgroup_matrix<T, R, C>(x);
}
struct msl_origin {
  ulong x, y;
  MSL_FN msl_origin(ulong both = 0) : x(both), y(both) {}
  MSL_FN msl_origin(ulong2 o) : x(o.x), y(o.y) {}
};
template <class T>
MSL_FN void simdgroup_load(simdgroup_matrix<T, 8, 8>& m,
                           const T* source,
                           ulong stride = 8,
                           msl_origin origin = msl_origin(),
                           bool transpose = false,
                           MSL_LINE) {
  msl_together(21, line);
  const uint row = msl_row(msl_lane()), column = msl_column(msl_lane());
  for (uint i = 0; i < 2; i++) {
    m.elements.e[i] = transpose ? source[(origin.y + column + i) * stride + origin.x + row]
                                : source[(origin.y + row) * stride + origin.x + column + i];
  }
}
template <class T>
MSL_FN void simdgroup_store(simdgroup_matrix<T, 8, 8> m,
                            T* target,
                            ulong stride = 8,
                            msl_origin origin = msl_origin(),
                            bool transpose = false,
                            MSL_LINE) {
  msl_together(22, line);
  const uint row = msl_row(msl_lane()), column = msl_column(msl_lane());
  for (uint i = 0; i < 2; i++) {
    (transpose ? target[(origin.y + column + i) * stride + origin.x + row]
               : target[(origin.y + row) * stride + origin.x + column + i]) = m.elements.e[i];
  }
}
template <class D, class A, class B, class C>
MSL_FN void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d,
                                          simdgroup_matrix<A, 8, 8> a,
                                          simdgroup_matrix<B, 8, 8> b,
                                          simdgroup_matrix<C, 8, 8> c,
                                          MSL_LINE) {
  const float fa[2] = {float(a.elements.e[0]), float(a.elements.e[1])};
  const float fb[2] = {float(b.elements.e[0]), float(b.elements.e[1])};
  const float fc[2] = {float(c.elements.e[0]), float(c.elements.e[1])};
  float fd[2];
  msl_multiply(fd, fa, fb, fc, line);
  d.elements.e[0] = D(fd[0]);
  d.elements.e[1] = D(fd[1]);
}
template <class D, class A, class B>
MSL_FN void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d,
                               simdgroup_matrix<A, 8, 8> a,
                               simdgroup_matrix<B, 8, 8> b,
                               MSL_LINE) {
  const auto zero = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  simdgroup_multiply_accumulate(d, a, b, zero, line);
}

// ---- atomics -------------------------------------------------------------------------------------
enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
template <class T>
using _atomic = atomic<T>;
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<ulong> atomic_ulong;
typedef atomic<bool> atomic_bool;
typedef atomic<float> atomic_float;
// Not seen by the checks of ordinary loads and stores; msl_atomic makes its own.
#define MSL_ATOMIC                                                                                 \
  template <class T>                                                                               \
  __attribute__((noinline, no_sanitize("address", "alignment", "signed-integer-overflow")))
MSL_ATOMIC T
msl_exchange(volatile atomic<T>* object, T* expected, T desired, bool compare, int line) {
  T old;
  msl_atomic(object, sizeof(T), 1, line);
  __atomic_load(&object->value, &old, __ATOMIC_RELAXED);
  if (compare) {
    old = *expected;
    __atomic_compare_exchange(&object->value, &old, &desired, false, __ATOMIC_RELAXED,
                              __ATOMIC_RELAXED);
    return old;
  }
  while (!__atomic_compare_exchange(&object->value, &old, &desired, false, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED)) {
  }
  return old;
}
#define MSL_FETCH(name, expression)                                                                \
  MSL_ATOMIC T msl_##name(volatile atomic<T>* object, T x, int line) {                             \
    T old, desired;                                                                                \
    msl_atomic(object, sizeof(T), 1, line);                                                        \
    __atomic_load(&object->value, &old, __ATOMIC_RELAXED);                                         \
    do {                                                                                           \
      desired = expression;                                                                        \
    } while (!__atomic_compare_exchange(&object->value, &old, &desired, false, __ATOMIC_RELAXED,   \
                                        __ATOMIC_RELAXED));                                        \
    return old;                                                                                    \
  }                                                                                                \
  template <class T>                                                                               \
  MSL_FN T atomic_##name##_explicit(volatile atomic<T>* object, typename msl_plain<T>::type x,     \
                                    memory_order, MSL_LINE) {                                      \
    return msl_##name(object, x, line);                                                            \
  }
MSL_FETCH(fetch_add, T(old + x))
MSL_FETCH(fetch_sub, T(old - x))
MSL_FETCH(fetch_and, T(old& x))
MSL_FETCH(fetch_or, T(old | x))
MSL_FETCH(fetch_xor, T(old ^ x))
MSL_FETCH(fetch_max, max(old, x))
MSL_FETCH(fetch_min, min(old, x))
#undef MSL_FETCH
MSL_ATOMIC T msl_atomic_load(const volatile atomic<T>* object, int line) {
  T value;
  msl_atomic(object, sizeof(T), 0, line);
  __atomic_load(&object->value, &value, __ATOMIC_RELAXED);
  return value;
}
MSL_ATOMIC void msl_atomic_store(volatile atomic<T>* object, T x, int line) {
  msl_atomic(object, sizeof(T), 2, line);
  __atomic_store(&object->value, &x, __ATOMIC_RELAXED);
}
#undef MSL_ATOMIC
template <class T>
MSL_FN T atomic_load_explicit(const volatile atomic<T>* object, memory_order, MSL_LINE) {
  return msl_atomic_load(object, line);
}
template <class T>
MSL_FN void atomic_store_explicit(volatile atomic<T>* object,
                                  typename msl_plain<T>::type x,
                                  memory_order,
                                  MSL_LINE) {
  msl_atomic_store(object, x, line);
}
template <class T>
MSL_FN T atomic_exchange_explicit(volatile atomic<T>* object,
                                  typename msl_plain<T>::type x,
                                  memory_order,
                                  MSL_LINE) {
  return msl_exchange(object, static_cast<T*>(nullptr), x, false, line);
}
template <class T>
MSL_FN bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* object,
                                                  T* expected,
                                                  typename msl_plain<T>::type desired,
                                                  memory_order,
                                                  memory_order,
                                                  MSL_LINE) {
  const T found = msl_exchange(object, expected, desired, true, line);
  const bool equal = found == *expected;
  *expected = found;
  return equal;
}
#undef MSL_LINE

struct os_log {
  constexpr os_log(const char*, const char*) {}
  template <class... A>
  MSL_FN void log_debug(const char*, A...) const {}
};
}  // namespace metal

MSL_FN constexpr metal::half operator""_h(long double x) {
  return metal::half(float(x));
}
MSL_FN constexpr metal::half operator""h(long double x) {
  return metal::half(float(x));
}
using metal::as_type;
using metal::bfloat;
using metal::half;
using metal::uchar;
using metal::uint;
using metal::ulong;
using metal::ushort;
using metal::vec;

// ---- keywords --------------------------------------------------------------------------------------
#define device
#define constant
#define thread
// Kernels are marked [[kernel]]: kept out of the entry function, which the checks do not see.
#define kernel gnu::noinline
#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL_VERSION__ 320
#define __METAL__ 1
#define double MSL_has_no_double
// Declarations of threadgroup variables are rewritten to MSL_THREADGROUP; the word is left on
// pointers and references, where it has no meaning on a CPU.
#define threadgroup
#define MSL_THREADGROUP(name, dims, ...)                                                           \
  typedef __VA_ARGS__ msl_type_of_##name dims;                                                     \
  msl_type_of_##name& name = *static_cast<msl_type_of_##name*>(                                    \
      msl_threadgroup(__COUNTER__, sizeof(msl_type_of_##name), alignof(msl_type_of_##name),        \
                      sizeof(__VA_ARGS__), #name, __LINE__))

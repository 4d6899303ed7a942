// The Metal Shading Language, as far as the kernels use it, for NVRTC. A simdgroup is a warp; every
// collective names the whole warp, so a kernel whose lanes part ways hangs here instead of guessing.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MSL_FN __device__ __forceinline__
#undef INFINITY
#undef NAN
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fc00000)
#define M_LOG2E_F 1.44269504088896341f
#define M_LN2_F 0.693147180559945309f
#define M_PI_F 3.14159265358979324f

namespace metal {
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

template <class A, class B> struct is_same {
  static constexpr bool value = false;
};
template <class A> struct is_same<A, A> {
  static constexpr bool value = true;
};
template <class A, class B> constexpr bool is_same_v = is_same<A, B>::value;
template <bool B, class T, class F> struct conditional {
  using type = T;
};
template <class T, class F> struct conditional<false, T, F> {
  using type = F;
};
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;

template <class To, class From> MSL_FN To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- 16-bit floats: operations round, half converts implicitly both ways, bfloat to float only.
struct half {
  __half v;
  half() = default;
  MSL_FN half(__half x) : v(x) {}
  MSL_FN half(float x) : v(__float2half_rn(x)) {}
  MSL_FN half(int x) : v(__float2half_rn(float(x))) {}
  MSL_FN operator float() const { return __half2float(v); }
};
struct bfloat {
  __nv_bfloat16 v;
  bfloat() = default;
  MSL_FN explicit bfloat(__nv_bfloat16 x) : v(x) {}
  MSL_FN explicit bfloat(float x) : v(__float2bfloat16_rn(x)) {}
  MSL_FN explicit bfloat(int x) : v(__float2bfloat16_rn(float(x))) {}
  MSL_FN operator float() const { return __bfloat162float(v); }
};
#define MSL_NARROW(T, op)                                                                          \
  MSL_FN T operator op(T a, T b) { return T(float(a) op float(b)); }                               \
  MSL_FN T& operator op##=(T& a, T b) { return a = T(float(a) op float(b)); }
MSL_NARROW(half, +)
MSL_NARROW(half, -)
MSL_NARROW(half, *)
MSL_NARROW(half, /)
MSL_NARROW(bfloat, +)
MSL_NARROW(bfloat, -)
MSL_NARROW(bfloat, *)
MSL_NARROW(bfloat, /)
#undef MSL_NARROW
typedef half float16_t;
typedef bfloat bfloat16_t;

// ---- vectors: aligned like Metal's, trivially copied, so that one is one load -------------------
template <class T, int N> struct vec;
#define MSL_VEC(N)                                                                                 \
  vec() = default;                                                                                 \
  MSL_FN vec(T s) {                                                                                \
    for (int i = 0; i < N; i++) e[i] = s;                                                          \
  }                                                                                                \
  template <class U> MSL_FN explicit vec(vec<U, N> o) {                                            \
    for (int i = 0; i < N; i++) e[i] = static_cast<T>(o.e[i]);                                     \
  }                                                                                                \
  MSL_FN T& operator[](int i) { return e[i]; }                                                     \
  MSL_FN const T& operator[](int i) const { return e[i]; }
template <class T> struct alignas(2 * sizeof(T)) vec<T, 2> {
  union {
    T e[2];
    struct {
      T x, y;
    };
  };
  MSL_VEC(2)
  MSL_FN vec(T a, T b) {
    e[0] = a;
    e[1] = b;
  }
};
template <class T> struct alignas(4 * sizeof(T)) vec<T, 3> {
  union {
    T e[3];
    struct {
      T x, y, z;
    };
  };
  MSL_VEC(3)
  MSL_FN vec(T a, T b, T c) {
    e[0] = a;
    e[1] = b;
    e[2] = c;
  }
};
template <class T> struct alignas(4 * sizeof(T)) vec<T, 4> {
  union {
    T e[4];
    struct {
      T x, y, z, w;
    };
  };
  MSL_VEC(4)
  MSL_FN vec(T a, T b, T c, T d) {
    e[0] = a;
    e[1] = b;
    e[2] = c;
    e[3] = d;
  }
};
#undef MSL_VEC
template <class T> struct msl_plain {
  using type = T;
};
#define MSL_VEC_OP(op)                                                                             \
  template <class T, int N> MSL_FN vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {               \
    for (int i = 0; i < N; i++) a.e[i] = T(a.e[i] op b.e[i]);                                      \
    return a;                                                                                      \
  }                                                                                                \
  template <class T, int N>                                                                        \
  MSL_FN vec<T, N> operator op(vec<T, N> a, typename msl_plain<T>::type b) {                       \
    for (int i = 0; i < N; i++) a.e[i] = T(a.e[i] op b);                                           \
    return a;                                                                                      \
  }                                                                                                \
  template <class T, int N>                                                                        \
  MSL_FN vec<T, N> operator op(typename msl_plain<T>::type a, vec<T, N> b) {                       \
    for (int i = 0; i < N; i++) b.e[i] = T(a op b.e[i]);                                           \
    return b;                                                                                      \
  }                                                                                                \
  template <class T, int N, class U> MSL_FN vec<T, N>& operator op##=(vec<T, N>& a, U b) {         \
    return a = a op b;                                                                             \
  }
MSL_VEC_OP(+)
MSL_VEC_OP(-)
MSL_VEC_OP(*)
MSL_VEC_OP(/)
#undef MSL_VEC_OP
template <class T, int N> MSL_FN T dot(vec<T, N> a, vec<T, N> b) {
  T sum = T(a.e[0] * b.e[0]);
  for (int i = 1; i < N; i++) sum = T(sum + a.e[i] * b.e[i]);
  return sum;
}
#define MSL_VECTORS(T)                                                                             \
  typedef vec<T, 2> T##2;                                                                          \
  typedef vec<T, 3> T##3;                                                                          \
  typedef vec<T, 4> T##4;
MSL_VECTORS(float)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(char)
MSL_VECTORS(uchar)
#undef MSL_VECTORS

// ---- maths ---------------------------------------------------------------------------------------
#define MSL_UNARY(name, expression)                                                                \
  MSL_FN float name(float x) { return expression; }                                                \
  template <class T, int N> MSL_FN vec<T, N> name(vec<T, N> v) {                                   \
    for (int i = 0; i < N; i++) v.e[i] = T(name(float(v.e[i])));                                   \
    return v;                                                                                      \
  }
MSL_FN float msl_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#define MSL_MATHS                                                                                  \
  MSL_UNARY(log, ::logf(x))                                                                        \
  MSL_UNARY(log2, ::log2f(x))                                                                      \
  MSL_UNARY(sqrt, ::sqrtf(x))                                                                      \
  MSL_UNARY(rsqrt, ::rsqrtf(x))                                                                    \
  MSL_UNARY(sin, ::sinf(x))                                                                        \
  MSL_UNARY(cos, ::cosf(x))                                                                        \
  MSL_UNARY(tanh, ::tanhf(x))                                                                      \
  MSL_UNARY(floor, ::floorf(x))                                                                    \
  MSL_UNARY(ceil, ::ceilf(x))                                                                      \
  MSL_UNARY(rint, ::rintf(x))                                                                      \
  MSL_UNARY(round, ::roundf(x))                                                                    \
  MSL_UNARY(trunc, ::truncf(x))                                                                    \
  MSL_UNARY(fabs, ::fabsf(x))                                                                      \
  MSL_FN float pow(float x, float y) { return ::powf(x, y); }
MSL_MATHS
MSL_UNARY(exp, ::expf(x))
MSL_UNARY(exp2, ::exp2f(x))
namespace precise {
MSL_MATHS
MSL_UNARY(exp, ::expf(x))
MSL_UNARY(exp2, ::exp2f(x))
}  // namespace precise
namespace fast {
MSL_MATHS
MSL_UNARY(exp, msl_exp2(x * M_LOG2E_F))
MSL_UNARY(exp2, msl_exp2(x))
}  // namespace fast
#undef MSL_MATHS
#undef MSL_UNARY
#define MSL_INTEGERS(T)                                                                            \
  MSL_FN constexpr T max(T a, T b) { return a > b ? a : b; }                                       \
  MSL_FN constexpr T min(T a, T b) { return a < b ? a : b; }                                       \
  MSL_FN constexpr T clamp(T x, T low, T high) { return min(max(x, low), high); }
MSL_INTEGERS(int)
MSL_INTEGERS(uint)
MSL_INTEGERS(short)
MSL_INTEGERS(ushort)
MSL_INTEGERS(long)
MSL_INTEGERS(ulong)
#undef MSL_INTEGERS
MSL_FN float max(float a, float b) { return ::fmaxf(a, b); }
MSL_FN float min(float a, float b) { return ::fminf(a, b); }
MSL_FN float clamp(float x, float low, float high) { return min(max(x, low), high); }
MSL_FN float abs(float x) { return ::fabsf(x); }
MSL_FN int abs(int x) { return x < 0 ? -x : x; }
MSL_FN float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
MSL_FN bool isnan(float x) { return x != x; }
MSL_FN bool isinf(float x) { return ::fabsf(x) == INFINITY; }
template <class T> MSL_FN T select(T a, T b, bool c) { return c ? b : a; }

// ---- the simdgroup and the threadgroup ----------------------------------------------------------
MSL_FN uint msl_index() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
// Any type, in words of 32 bits.
template <class T, class F> MSL_FN T msl_exchange(T x, F exchange) {
  constexpr int WORDS = (sizeof(T) + 3) / 4;
  uint words[WORDS];
  words[WORDS - 1] = 0;
  memcpy(words, &x, sizeof(T));
  for (int i = 0; i < WORDS; i++) words[i] = exchange(words[i]);
  memcpy(&x, words, sizeof(T));
  return x;
}
#define MSL_SHUFFLE(name, function)                                                                \
  template <class T> MSL_FN T name(T x, ushort by) {                                               \
    return msl_exchange(x, [=](uint word) { return function(0xffffffffu, word, by); });            \
  }
MSL_SHUFFLE(simd_shuffle, __shfl_sync)
MSL_SHUFFLE(simd_broadcast, __shfl_sync)
MSL_SHUFFLE(simd_shuffle_xor, __shfl_xor_sync)
MSL_SHUFFLE(simd_shuffle_down, __shfl_down_sync)
MSL_SHUFFLE(simd_shuffle_up, __shfl_up_sync)
#undef MSL_SHUFFLE
template <class T> MSL_FN T simd_broadcast_first(T x) { return simd_shuffle(x, 0); }
#define MSL_REDUCE(name, expression)                                                               \
  template <class T> MSL_FN T name(T a) {                                                          \
    for (int distance = 16; distance > 0; distance /= 2) {                                         \
      const T b = simd_shuffle_xor(a, ushort(distance));                                           \
      a = T(expression);                                                                           \
    }                                                                                              \
    return a;                                                                                      \
  }
MSL_REDUCE(simd_sum, a + b)
MSL_REDUCE(simd_product, a* b)
MSL_REDUCE(simd_max, max(a, b))
MSL_REDUCE(simd_min, min(a, b))
MSL_REDUCE(simd_and, a& b)
MSL_REDUCE(simd_or, a | b)
#undef MSL_REDUCE
template <class T> MSL_FN T simd_prefix_inclusive_sum(T x) {
  for (uint distance = 1; distance < 32; distance *= 2) {
    const T y = simd_shuffle_up(x, ushort(distance));
    if (msl_index() % 32 >= distance) x = T(x + y);
  }
  return x;
}
template <class T> MSL_FN T simd_prefix_exclusive_sum(T x) {
  const T y = simd_shuffle_up(simd_prefix_inclusive_sum(x), 1);
  return msl_index() % 32 ? y : T(0);
}
MSL_FN bool simd_any(bool p) { return __any_sync(0xffffffffu, p); }
MSL_FN bool simd_all(bool p) { return __all_sync(0xffffffffu, p); }
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
MSL_FN constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}
MSL_FN void threadgroup_barrier(mem_flags) { __syncthreads(); }
MSL_FN void simdgroup_barrier(mem_flags) { __syncwarp(); }

// ---- matrices of 8 x 8 in Apple's layout: exact and slow. Kernels that need speed go through
// matrix.metal, whose operations matrix.h maps to tensor cores. -----------------------------------
MSL_FN uint msl_row(uint lane) { return (lane / 4 & 4) + lane / 2 % 4; }
MSL_FN uint msl_column(uint lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
MSL_FN uint msl_holder(uint row, uint column) {
  return (column >> 1 & 1) | (row & 3) << 1 | column >> 2 << 3 | row >> 2 << 4;
}
template <class T, int R, int C> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "simdgroup matrices are 8 x 8");
  vec<T, 2> elements;
  simdgroup_matrix() = default;
  MSL_FN explicit simdgroup_matrix(T diagonal) {
    const uint lane = msl_index() % 32;
    for (uint i = 0; i < 2; i++) {
      elements.e[i] = msl_row(lane) == msl_column(lane) + i ? diagonal : T(0.0f);
    }
  }
  MSL_FN vec<T, 2>& thread_elements() { return elements; }
  MSL_FN const vec<T, 2>& thread_elements() const { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class T, int R, int C = R> MSL_FN simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T x) {
  simdgroup_matrix<T, R, C> made;
  made.elements = vec<T, 2>(x, x);
  return made;
}
template <class T>
MSL_FN void simdgroup_load(
    simdgroup_matrix<T, 8, 8>& m, const T* source, ulong stride = 8, ulong = 0, bool transposed = false) {
  const uint row = msl_row(msl_index() % 32), column = msl_column(msl_index() % 32);
  for (uint i = 0; i < 2; i++) {
    m.elements.e[i] = transposed ? source[(column + i) * stride + row] : source[row * stride + column + i];
  }
}
template <class T>
MSL_FN void simdgroup_store(
    simdgroup_matrix<T, 8, 8> m, T* target, ulong stride = 8, ulong = 0, bool transposed = false) {
  const uint row = msl_row(msl_index() % 32), column = msl_column(msl_index() % 32);
  for (uint i = 0; i < 2; i++) {
    (transposed ? target[(column + i) * stride + row] : target[row * stride + column + i]) = m.elements.e[i];
  }
}
template <class D, class A, class B, class C>
MSL_FN void simdgroup_multiply_accumulate(
    simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b,
    simdgroup_matrix<C, 8, 8> c) {
  const uint lane = msl_index() % 32, row = msl_row(lane), column = msl_column(lane);
  float sums[2] = {float(c.elements.e[0]), float(c.elements.e[1])};
  for (uint k = 0; k < 8; k++) {
    const float left = simd_shuffle(float(a.elements.e[k & 1]), ushort(msl_holder(row, k)));
    const ushort holder = ushort(msl_holder(k, column));
    for (uint i = 0; i < 2; i++) {
      sums[i] = ::fmaf(left, simd_shuffle(float(b.elements.e[i]), holder), sums[i]);
    }
  }
  d.elements.e[0] = D(sums[0]);
  d.elements.e[1] = D(sums[1]);
}
template <class D, class A, class B>
MSL_FN void simdgroup_multiply(
    simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a, simdgroup_matrix<B, 8, 8> b) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8, 8>(0.0f));
}
}  // namespace metal

// Names in the scope of a kernel: they hide CUDA's own ::float4, ::max and so on.
#define MSL_NAMES                                                                                  \
  using namespace metal;                                                                           \
  using metal::half;                                                                               \
  using metal::bfloat;                                                                             \
  using metal::float16_t;                                                                          \
  using metal::bfloat16_t;                                                                         \
  using metal::uchar;                                                                              \
  using metal::ushort;                                                                             \
  using metal::uint;                                                                               \
  using metal::ulong;                                                                              \
  using metal::float2;                                                                             \
  using metal::float3;                                                                             \
  using metal::float4;                                                                             \
  using metal::half2;                                                                              \
  using metal::half4;                                                                              \
  using metal::bfloat2;                                                                            \
  using metal::bfloat4;                                                                            \
  using metal::int2;                                                                               \
  using metal::int3;                                                                               \
  using metal::int4;                                                                               \
  using metal::uint2;                                                                              \
  using metal::uint3;                                                                              \
  using metal::uint4;                                                                              \
  using metal::short2;                                                                             \
  using metal::short4;                                                                             \
  using metal::ushort2;                                                                            \
  using metal::ushort4;                                                                            \
  using metal::char2;                                                                              \
  using metal::char4;                                                                              \
  using metal::uchar2;                                                                             \
  using metal::uchar4;                                                                             \
  using metal::max;                                                                                \
  using metal::min;                                                                                \
  using metal::clamp;                                                                              \
  using metal::abs;                                                                                \
  using metal::fma;                                                                                \
  using metal::fabs;                                                                               \
  using metal::exp;                                                                                \
  using metal::exp2;                                                                               \
  using metal::log;                                                                                \
  using metal::log2;                                                                               \
  using metal::sqrt;                                                                               \
  using metal::rsqrt;                                                                              \
  using metal::tanh;                                                                               \
  using metal::sin;                                                                                \
  using metal::cos;                                                                                \
  using metal::pow;                                                                                \
  using metal::floor;                                                                              \
  using metal::ceil;                                                                               \
  using metal::rint;                                                                               \
  using metal::round;                                                                              \
  using metal::trunc;                                                                              \
  using metal::isnan;                                                                              \
  using metal::isinf;                                                                              \
  using metal::select;                                                                             \
  using metal::as_type;
#define METAL_FUNC __device__ __forceinline__

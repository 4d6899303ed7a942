// For checking only: nothing here is defined, and address spaces are real. Read by two front ends,
// neither of which is Metal's own:
//   C++17 with address_space attributes: a pointer without an address space is one to thread memory;
//   C++ for OpenCL 2021: references to thread memory do not bind to device memory.
// `half` and `bfloat` are the two 16-bit types that the front end has on 64-bit Arm.
#pragma once
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
#ifdef __OPENCL_CPP_VERSION__
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
typedef _Float16 bfloat;
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#else
typedef _Float16 half;
typedef __fp16 bfloat;
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define MSL_THREADGROUP(name, dims, ...) static threadgroup __VA_ARGS__ name dims
#endif
typedef half float16_t;
typedef bfloat bfloat16_t;
#define double MSL_has_no_double
#define METAL_FUNC inline
#define __METAL__ 1
#define __METAL_VERSION__ 320
#undef INFINITY
#undef NAN
#define INFINITY __builtin_huge_valf()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_huge_valf()
#define MAXFLOAT 3.402823466e38f
#define FLT_MAX 3.402823466e38f
#define FLT_MIN 1.17549435e-38f
#define FLT_EPSILON 1.1920929e-7f
#define HALF_MAX 65504.0f
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LOG10E_F 0.434294481903251827651f
#define M_LN2_F 0.693147180559945309417f
#define M_LN10_F 2.30258509299404568402f
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_1_PI_F 0.318309886183790671538f
#define M_2_SQRTPI_F 1.12837916709551257390f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.707106781186547524401f

#define MSL_VECTORS(T)                                                                             \
  typedef T T##2 __attribute__((ext_vector_type(2)));                                              \
  typedef T T##3 __attribute__((ext_vector_type(3)));                                              \
  typedef T T##4 __attribute__((ext_vector_type(4)));
MSL_VECTORS(float)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(long)
MSL_VECTORS(ulong)

namespace metal {
template <class T, int N>
struct msl_vector {
  using type = T __attribute__((ext_vector_type(N)));
};
template <class T, int N>
using vec = typename msl_vector<T, N>::type;
template <class A, class B>
constexpr bool is_same_v = false;
template <class A>
constexpr bool is_same_v<A, A> = true;
template <class A, class B>
struct is_same {
  static constexpr bool value = is_same_v<A, B>;
};
template <bool B, class T, class F>
struct conditional {
  using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;
template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;
// What "float4(a, b, c, d)" is rewritten to: these vectors are no classes.
template <class V, class... A>
V msl_made(A...);
template <class To, class From>
To as_type(From);

#define MSL_1(name)                                                                                \
  float name(float);                                                                               \
  half name(half);                                                                                 \
  bfloat name(bfloat);                                                                             \
  float2 name(float2);                                                                             \
  float3 name(float3);                                                                             \
  float4 name(float4);
#define MSL_2(name)                                                                                \
  float name(float, float);                                                                        \
  half name(half, half);                                                                           \
  bfloat name(bfloat, bfloat);                                                                     \
  float2 name(float2, float2);                                                                     \
  float3 name(float3, float3);                                                                     \
  float4 name(float4, float4);
#define MSL_MATHS                                                                                  \
  MSL_1(exp)                                                                                       \
  MSL_1(exp2)                                                                                      \
  MSL_1(exp10) MSL_1(log) MSL_1(log2) MSL_1(log10) MSL_1(sqrt) MSL_1(rsqrt) MSL_1(sin) MSL_1(cos)  \
      MSL_1(tan) MSL_1(sinh) MSL_1(cosh) MSL_1(tanh) MSL_1(asin) MSL_1(acos) MSL_1(atan)           \
          MSL_1(asinh) MSL_1(acosh) MSL_1(atanh) MSL_1(floor) MSL_1(ceil) MSL_1(rint) MSL_1(round) \
              MSL_1(trunc) MSL_1(fabs) MSL_1(fract) MSL_2(pow) MSL_2(powr) MSL_2(atan2)            \
                  MSL_2(fmod) MSL_2(copysign) MSL_2(divide)
MSL_MATHS
namespace fast {
MSL_MATHS
}
namespace precise {
MSL_MATHS
}
#define MSL_MIN_MAX(T)                                                                             \
  T max(T, T);                                                                                     \
  T min(T, T);                                                                                     \
  T clamp(T, T, T);                                                                                \
  T abs(T);
MSL_MIN_MAX(float)
MSL_MIN_MAX(half)
MSL_MIN_MAX(bfloat)
MSL_MIN_MAX(int)
MSL_MIN_MAX(uint)
MSL_MIN_MAX(short)
MSL_MIN_MAX(ushort)
MSL_MIN_MAX(char)
MSL_MIN_MAX(uchar)
MSL_MIN_MAX(long)
MSL_MIN_MAX(ulong)
MSL_MIN_MAX(float2)
MSL_MIN_MAX(float3)
MSL_MIN_MAX(float4)
MSL_MIN_MAX(int4)
MSL_MIN_MAX(uint4)
#define MSL_FLOAT(T)                                                                               \
  T fma(T, T, T);                                                                                  \
  T mix(T, T, T);                                                                                  \
  T fmax(T, T);                                                                                    \
  T fmin(T, T);                                                                                    \
  T saturate(T);                                                                                   \
  T sign(T);                                                                                       \
  bool isnan(T);                                                                                   \
  bool isinf(T);                                                                                   \
  bool isfinite(T);                                                                                \
  bool signbit(T);
MSL_FLOAT(float)
MSL_FLOAT(half)
MSL_FLOAT(bfloat)
float2 fma(float2, float2, float2);
float4 fma(float4, float4, float4);
float dot(float2, float2);
float dot(float3, float3);
float dot(float4, float4);
half dot(half2, half2);
half dot(half4, half4);
float length(float2);
float length(float4);
float ldexp(float, int);
template <class T>
T select(T, T, bool);
uint popcount(uint);
int popcount(int);
uint clz(uint);
uint ctz(uint);
int mul24(int, int);
uint mulhi(uint, uint);
template <class T>
struct numeric_limits {
  static constexpr T infinity() { return T(1); }
  static constexpr T quiet_NaN() { return T(1); }
  static constexpr T max() { return T(1); }
  static constexpr T min() { return T(1); }
  static constexpr T lowest() { return T(1); }
  static constexpr T epsilon() { return T(1); }
};

// No 64-bit types: Metal has no SIMD-group functions for them.
#define MSL_LANES(declare)                                                                         \
  declare(float) declare(half) declare(bfloat) declare(int) declare(uint) declare(short)           \
      declare(ushort) declare(char) declare(uchar) declare(float2) declare(float4) declare(half2)  \
          declare(half4) declare(int2) declare(int4) declare(uint2) declare(uint4)
#define MSL_REDUCED(T)                                                                             \
  T simd_sum(T);                                                                                   \
  T simd_product(T);                                                                               \
  T simd_max(T);                                                                                   \
  T simd_min(T);                                                                                   \
  T simd_and(T);                                                                                   \
  T simd_or(T);                                                                                    \
  T simd_xor(T);                                                                                   \
  T simd_prefix_inclusive_sum(T);                                                                  \
  T simd_prefix_exclusive_sum(T);                                                                  \
  T simd_prefix_inclusive_product(T);                                                              \
  T simd_prefix_exclusive_product(T);                                                              \
  T simd_broadcast_first(T);                                                                       \
  T quad_sum(T);                                                                                   \
  T quad_max(T);                                                                                   \
  T quad_min(T);
#define MSL_SHUFFLED(T)                                                                            \
  T simd_shuffle(T, ushort);                                                                       \
  T simd_broadcast(T, ushort);                                                                     \
  T simd_shuffle_xor(T, ushort);                                                                   \
  T simd_shuffle_down(T, ushort);                                                                  \
  T simd_shuffle_up(T, ushort);                                                                    \
  T simd_shuffle_rotate_down(T, ushort);                                                           \
  T simd_shuffle_rotate_up(T, ushort);                                                             \
  T simd_shuffle_and_fill_up(T, T, ushort);                                                        \
  T simd_shuffle_and_fill_down(T, T, ushort);                                                      \
  T quad_shuffle(T, ushort);                                                                       \
  T quad_broadcast(T, ushort);                                                                     \
  T quad_shuffle_xor(T, ushort);
MSL_LANES(MSL_REDUCED)
MSL_LANES(MSL_SHUFFLED)
bool simd_any(bool);
bool simd_all(bool);
bool simd_is_first();
struct simd_vote {
  typedef uint64_t vote_t;
  uint64_t votes;
  explicit operator uint64_t() const;
  bool all() const;
  bool any() const;
};
simd_vote simd_ballot(bool);
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

template <class T, int R, int C>
struct simdgroup_matrix {
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T);
  vec<T, 2> elements;
  thread vec<T, 2>& thread_elements();
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
template <class T, int R, int C = R>
simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T);
template <class T, int R, int C = R>
simdgroup_matrix<T, R, C> make_diagonal_simdgroup_matrix(T);
#define MSL_MATRIX(space)                                                                          \
  template <class T>                                                                               \
  void simdgroup_load(thread simdgroup_matrix<T, 8, 8>&, const space T*, ulong = 8,                \
                      ulong2 = ulong2(0), bool = false);                                           \
  template <class T>                                                                               \
  void simdgroup_store(simdgroup_matrix<T, 8, 8>, space T*, ulong = 8, ulong2 = ulong2(0),         \
                       bool = false);
MSL_MATRIX(device)
MSL_MATRIX(threadgroup)
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>&,
                                   simdgroup_matrix<A, 8, 8>,
                                   simdgroup_matrix<B, 8, 8>,
                                   simdgroup_matrix<C, 8, 8>);
template <class D, class A, class B>
void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>&,
                        simdgroup_matrix<A, 8, 8>,
                        simdgroup_matrix<B, 8, 8>);

enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<ulong> atomic_ulong;
typedef atomic<float> atomic_float;
template <class T>
struct msl_plain {
  using type = T;
};
#define MSL_ATOMIC(space)                                                                          \
  template <class T>                                                                               \
  T atomic_load_explicit(const volatile space atomic<T>*, memory_order);                           \
  MSL_UPDATES(space, fetch_add)                                                                    \
  MSL_UPDATES(space, fetch_sub)                                                                    \
  MSL_UPDATES(space, fetch_and)                                                                    \
  MSL_UPDATES(space, fetch_or)                                                                     \
  MSL_UPDATES(space, fetch_xor)                                                                    \
  MSL_UPDATES(space, fetch_max)                                                                    \
  MSL_UPDATES(space, fetch_min)                                                                    \
  MSL_UPDATES(space, exchange)                                                                     \
  template <class T>                                                                               \
  void atomic_store_explicit(volatile space atomic<T>*, typename msl_plain<T>::type,               \
                             memory_order);                                                        \
  template <class T>                                                                               \
  bool atomic_compare_exchange_weak_explicit(volatile space atomic<T>*, thread T*,                 \
                                             typename msl_plain<T>::type, memory_order,            \
                                             memory_order);
#define MSL_UPDATES(space, name)                                                                   \
  template <class T>                                                                               \
  T atomic_##name##_explicit(volatile space atomic<T>*, typename msl_plain<T>::type,               \
                             memory_order);
MSL_ATOMIC(device)
MSL_ATOMIC(threadgroup)
}  // namespace metal
using namespace metal;

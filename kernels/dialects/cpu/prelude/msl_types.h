// Types and scalar functions of the Metal Shading Language, for execution on a CPU. Freestanding:
// no system header is read, so that the language's keywords can be macros (msl_keywords.h).
#pragma once

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;

#define MSL_FN inline __attribute__((always_inline))
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

namespace metal {
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

// ---- traits --------------------------------------------------------------------------------
template <class T, T V>
struct integral_constant {
  static constexpr T value = V;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return V; }
  constexpr T operator()() const { return V; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;
template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;
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
template <class A, class B>
struct is_same : false_type {};
template <class A>
struct is_same<A, A> : true_type {};
template <class A, class B>
constexpr bool is_same_v = is_same<A, B>::value;
template <class T>
struct remove_const {
  using type = T;
};
template <class T>
struct remove_const<const T> {
  using type = T;
};
template <class T>
struct remove_volatile {
  using type = T;
};
template <class T>
struct remove_volatile<volatile T> {
  using type = T;
};
template <class T>
using remove_const_t = typename remove_const<T>::type;
template <class T>
struct remove_cv {
  using type = typename remove_volatile<typename remove_const<T>::type>::type;
};
template <class T>
using remove_cv_t = typename remove_cv<T>::type;
template <class T>
struct remove_reference {
  using type = T;
};
template <class T>
struct remove_reference<T&> {
  using type = T;
};
template <class T>
using remove_reference_t = typename remove_reference<T>::type;
template <class T>
struct remove_pointer {
  using type = T;
};
template <class T>
struct remove_pointer<T*> {
  using type = T;
};
template <class T>
using remove_pointer_t = typename remove_pointer<T>::type;
template <class T>
using remove_addrspace_t = T;
template <class T>
struct is_const : false_type {};
template <class T>
struct is_const<const T> : true_type {};
template <class T>
constexpr bool is_const_v = is_const<T>::value;
template <class T>
struct is_pointer : false_type {};
template <class T>
struct is_pointer<T*> : true_type {};
template <class T>
constexpr bool is_pointer_v = is_pointer<T>::value;
template <class T>
struct msl_integral : false_type {};
#define MSL_INTEGRAL(T)                                                                            \
  template <>                                                                                      \
  struct msl_integral<T> : true_type {};
MSL_INTEGRAL(bool)
MSL_INTEGRAL(char)
MSL_INTEGRAL(signed char)
MSL_INTEGRAL(unsigned char)
MSL_INTEGRAL(short)
MSL_INTEGRAL(unsigned short)
MSL_INTEGRAL(int)
MSL_INTEGRAL(unsigned int)
MSL_INTEGRAL(long)
MSL_INTEGRAL(unsigned long)
#undef MSL_INTEGRAL
template <class T>
struct is_integral : msl_integral<remove_cv_t<T>> {};
template <class T>
constexpr bool is_integral_v = is_integral<T>::value;
template <class A, class B>
struct is_convertible : bool_constant<__is_convertible_to(A, B)> {};
template <class A, class B>
constexpr bool is_convertible_v = is_convertible<A, B>::value;

template <class T>
MSL_FN T* addressof(T& x) {
  return __builtin_addressof(x);
}

template <class To, class From>
MSL_FN To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  To to;
  __builtin_memcpy(static_cast<void*>(&to), static_cast<const void*>(&from), sizeof(To));
  return to;
}

// ---- half: converts implicitly both ways. A class, because the compilers that are to be found do
// not all have _Float16 on every CPU; every operation rounds. -------------------------------------
struct bfloat;
struct half {
  __fp16 v;
  half() = default;
  MSL_FN constexpr half(float x) : v(x) {}
  template <class T, class = enable_if_t<is_integral_v<T>>>
  MSL_FN constexpr half(T x) : v(static_cast<float>(x)) {}
  MSL_FN explicit half(bfloat x);
  MSL_FN constexpr operator float() const { return v; }
};

// ---- bfloat: to float implicitly, from anything only explicitly (MSL 3.1) -----------------------
struct bfloat {
  uint16_t bits;
  struct raw {};
  bfloat() = default;
  MSL_FN constexpr bfloat(raw, uint16_t b) : bits(b) {}
  MSL_FN static constexpr uint16_t rounded(float x) {
    const uint32_t u = __builtin_bit_cast(uint32_t, x);
    if ((u & 0x7fffffffu) > 0x7f800000u) {
      return 0x7fc0;
    }
    return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  MSL_FN constexpr explicit bfloat(float x) : bits(rounded(x)) {}
  MSL_FN constexpr explicit bfloat(half x) : bits(rounded(static_cast<float>(x))) {}
  template <class T, class = enable_if_t<is_integral_v<T>>>
  MSL_FN constexpr explicit bfloat(T x) : bits(rounded(static_cast<float>(x))) {}
  MSL_FN constexpr operator float() const {
    return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
  }
};
MSL_FN half::half(bfloat x) : v(static_cast<float>(x)) {}

template <class T>
struct is_floating_point
    : bool_constant<is_same_v<remove_cv_t<T>, float> || is_same_v<remove_cv_t<T>, half> ||
                    is_same_v<remove_cv_t<T>, bfloat>> {};
template <class T>
constexpr bool is_floating_point_v = is_floating_point<T>::value;
template <class T>
struct is_arithmetic : bool_constant<is_integral_v<T> || is_floating_point_v<T>> {};
template <class T>
constexpr bool is_arithmetic_v = is_arithmetic<T>::value;
template <class T, bool I = is_integral_v<T>>
struct is_signed : is_floating_point<T> {};
template <class T>
struct is_signed<T, true> : bool_constant<(T(-1) < T(0))> {};
template <class T>
constexpr bool is_signed_v = is_signed<T>::value;
template <class T>
struct is_unsigned : bool_constant<is_integral_v<T> && !is_signed_v<T>> {};
template <class T>
constexpr bool is_unsigned_v = is_unsigned<T>::value;

// The type of an operation on two 16-bit floats, or on one and an integer; nothing else.
template <class A, class B>
struct msl_narrow {};
template <>
struct msl_narrow<half, half> {
  using type = half;
};
template <>
struct msl_narrow<bfloat, bfloat> {
  using type = bfloat;
};
template <class T>
using msl_only_integral = enable_if_t<is_integral_v<T>, T>;
#define MSL_NARROW(op)                                                                             \
  template <class A, class B>                                                                      \
  MSL_FN constexpr typename msl_narrow<A, B>::type operator op(A a, B b) {                         \
    return typename msl_narrow<A, B>::type(static_cast<float>(a) op static_cast<float>(b));        \
  }                                                                                                \
  template <class I, class = msl_only_integral<I>>                                                 \
  MSL_FN constexpr half operator op(half a, I b) {                                                 \
    return half(static_cast<float>(a) op static_cast<float>(b));                                   \
  }                                                                                                \
  template <class I, class = msl_only_integral<I>>                                                 \
  MSL_FN constexpr half operator op(I a, half b) {                                                 \
    return half(static_cast<float>(a) op static_cast<float>(b));                                   \
  }                                                                                                \
  template <class B>                                                                               \
  MSL_FN half& operator op## = (half & a, B b) {                                                   \
    a = half(static_cast<float>(a) op static_cast<float>(b));                                      \
    return a;                                                                                      \
  }                                                                                                \
  MSL_FN bfloat& operator op## = (bfloat & a, bfloat b) {                                          \
    a = bfloat(static_cast<float>(a) op static_cast<float>(b));                                    \
    return a;                                                                                      \
  }
MSL_NARROW(+)
MSL_NARROW(-)
MSL_NARROW(*)
MSL_NARROW(/)
#undef MSL_NARROW
MSL_FN constexpr half operator-(half a) {
  return half(-static_cast<float>(a));
}
MSL_FN constexpr bfloat operator-(bfloat a) {
  return bfloat(bfloat::raw(), static_cast<uint16_t>(a.bits ^ 0x8000u));
}

// ---- vec<T, N>: aligned like Metal's (three elements take the room of four) --------------------
template <class T, int N>
struct vec;
template <class T>
struct msl_plain {
  using type = T;
};
template <class V>
struct is_vector : false_type {};
template <class T, int N>
struct is_vector<vec<T, N>> : true_type {};

// Some elements of a vector, as a view of its storage.
template <class T, int WIDTH, int... I>
struct msl_swizzle {
  T e[WIDTH];
  MSL_FN operator vec<T, sizeof...(I)>() const {
    vec<T, sizeof...(I)> result;
    int k = 0;
    ((result.e[k++] = e[I]), ...);
    return result;
  }
  MSL_FN msl_swizzle& operator=(vec<T, sizeof...(I)> other) {
    int k = 0;
    ((e[I] = other.e[k++]), ...);
    return *this;
  }
  MSL_FN msl_swizzle& operator=(const msl_swizzle& other) {
    return *this = static_cast<vec<T, sizeof...(I)>>(other);
  }
  template <class U>
  MSL_FN void operator+=(U o) {
    *this = vec<T, sizeof...(I)>(*this) + o;
  }
  template <class U>
  MSL_FN void operator-=(U o) {
    *this = vec<T, sizeof...(I)>(*this) - o;
  }
  template <class U>
  MSL_FN void operator*=(U o) {
    *this = vec<T, sizeof...(I)>(*this) * o;
  }
};

#define MSL_VEC_COMMON(N)                                                                          \
  vec() = default;                                                                                 \
  MSL_FN vec(const vec& o) {                                                                       \
    for (int i = 0; i < N; i++) e[i] = o.e[i];                                                     \
  }                                                                                                \
  MSL_FN vec& operator=(const vec& o) {                                                            \
    for (int i = 0; i < N; i++) e[i] = o.e[i];                                                     \
    return *this;                                                                                  \
  }                                                                                                \
  MSL_FN vec(T s) {                                                                                \
    for (int i = 0; i < N; i++) e[i] = s;                                                          \
  }                                                                                                \
  template <class U>                                                                               \
  MSL_FN explicit vec(vec<U, N> o) {                                                               \
    for (int i = 0; i < N; i++) e[i] = static_cast<T>(o.e[i]);                                     \
  }                                                                                                \
  MSL_FN T& operator[](int i) {                                                                    \
    return e[i];                                                                                   \
  }                                                                                                \
  MSL_FN const T& operator[](int i) const {                                                        \
    return e[i];                                                                                   \
  }

template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  union {
    T e[2];
    struct {
      T x, y;
    };
    struct {
      T r, g;
    };
    msl_swizzle<T, 2, 0, 1> xy;
    msl_swizzle<T, 2, 1, 0> yx;
    msl_swizzle<T, 2, 0, 0> xx;
    msl_swizzle<T, 2, 1, 1> yy;
  };
  MSL_VEC_COMMON(2)
  MSL_FN vec(T a, T b) {
    e[0] = a;
    e[1] = b;
  }
};
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  union {
    T e[3];
    struct {
      T x, y, z;
    };
    struct {
      T r, g, b;
    };
    msl_swizzle<T, 3, 0, 1> xy;
    msl_swizzle<T, 3, 1, 2> yz;
    msl_swizzle<T, 3, 0, 2> xz;
    msl_swizzle<T, 3, 0, 1, 2> xyz;
    msl_swizzle<T, 3, 2, 1, 0> zyx;
  };
  MSL_VEC_COMMON(3)
  MSL_FN vec(T a, T b, T c) {
    e[0] = a;
    e[1] = b;
    e[2] = c;
  }
  MSL_FN vec(vec<T, 2> a, T c) : vec(a.e[0], a.e[1], c) {}
  MSL_FN vec(T a, vec<T, 2> b) : vec(a, b.e[0], b.e[1]) {}
};
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  union {
    T e[4];
    struct {
      T x, y, z, w;
    };
    struct {
      T r, g, b, a;
    };
    msl_swizzle<T, 4, 0, 1> xy, lo;
    msl_swizzle<T, 4, 2, 3> zw, hi;
    msl_swizzle<T, 4, 1, 2> yz;
    msl_swizzle<T, 4, 0, 2> xz;
    msl_swizzle<T, 4, 1, 3> yw;
    msl_swizzle<T, 4, 0, 1, 2> xyz;
    msl_swizzle<T, 4, 1, 2, 3> yzw;
    msl_swizzle<T, 4, 3, 2, 1, 0> wzyx;
  };
  MSL_VEC_COMMON(4)
  MSL_FN vec(T p, T q, T s, T t) {
    e[0] = p;
    e[1] = q;
    e[2] = s;
    e[3] = t;
  }
  MSL_FN vec(vec<T, 2> p, vec<T, 2> q) : vec(p.e[0], p.e[1], q.e[0], q.e[1]) {}
  MSL_FN vec(vec<T, 2> p, T q, T s) : vec(p.e[0], p.e[1], q, s) {}
  MSL_FN vec(vec<T, 3> p, T q) : vec(p.e[0], p.e[1], p.e[2], q) {}
  MSL_FN vec(T p, vec<T, 3> q) : vec(p, q.e[0], q.e[1], q.e[2]) {}
};
#undef MSL_VEC_COMMON

#define MSL_VEC_BINARY(op, R)                                                                      \
  template <class T, int N>                                                                        \
  MSL_FN vec<R, N> operator op(vec<T, N> a, vec<T, N> b) {                                         \
    vec<R, N> r;                                                                                   \
    for (int i = 0; i < N; i++) r.e[i] = R(a.e[i] op b.e[i]);                                      \
    return r;                                                                                      \
  }                                                                                                \
  template <class T, int N>                                                                        \
  MSL_FN vec<R, N> operator op(vec<T, N> a, typename msl_plain<T>::type b) {                       \
    vec<R, N> r;                                                                                   \
    for (int i = 0; i < N; i++) r.e[i] = R(a.e[i] op b);                                           \
    return r;                                                                                      \
  }                                                                                                \
  template <class T, int N>                                                                        \
  MSL_FN vec<R, N> operator op(typename msl_plain<T>::type a, vec<T, N> b) {                       \
    vec<R, N> r;                                                                                   \
    for (int i = 0; i < N; i++) r.e[i] = R(a op b.e[i]);                                           \
    return r;                                                                                      \
  }
#define MSL_VEC_ARITHMETIC(op)                                                                     \
  MSL_VEC_BINARY(op, T)                                                                            \
  template <class T, int N, class U>                                                               \
  MSL_FN vec<T, N>& operator op## = (vec<T, N> & a, U b) {                                         \
    a = a op b;                                                                                    \
    return a;                                                                                      \
  }
MSL_VEC_ARITHMETIC(+)
MSL_VEC_ARITHMETIC(-)
MSL_VEC_ARITHMETIC(*)
MSL_VEC_ARITHMETIC(/)
MSL_VEC_ARITHMETIC(%)
MSL_VEC_ARITHMETIC(&)
MSL_VEC_ARITHMETIC(|)
MSL_VEC_ARITHMETIC(^)
MSL_VEC_ARITHMETIC(<<)
MSL_VEC_ARITHMETIC(>>)
MSL_VEC_BINARY(<, bool)
MSL_VEC_BINARY(>, bool)
MSL_VEC_BINARY(<=, bool)
MSL_VEC_BINARY(>=, bool)
MSL_VEC_BINARY(==, bool)
MSL_VEC_BINARY(!=, bool)
MSL_VEC_BINARY(&&, bool)
MSL_VEC_BINARY(||, bool)
#undef MSL_VEC_ARITHMETIC
#undef MSL_VEC_BINARY
#define MSL_VEC_UNARY(op)                                                                          \
  template <class T, int N>                                                                        \
  MSL_FN vec<T, N> operator op(vec<T, N> a) {                                                      \
    for (int i = 0; i < N; i++) a.e[i] = T(op a.e[i]);                                             \
    return a;                                                                                      \
  }
MSL_VEC_UNARY(-)
MSL_VEC_UNARY(~)
MSL_VEC_UNARY(!)
#undef MSL_VEC_UNARY
template <int N>
MSL_FN bool any(vec<bool, N> a) {
  bool result = false;
  for (int i = 0; i < N; i++) result = result || a.e[i];
  return result;
}
template <int N>
MSL_FN bool all(vec<bool, N> a) {
  bool result = true;
  for (int i = 0; i < N; i++) result = result && a.e[i];
  return result;
}

// Vectors without padding or alignment beyond that of their elements.
template <class T, int N>
struct packed_vec {
  T e[N];
  packed_vec() = default;
  MSL_FN packed_vec(vec<T, N> o) {
    for (int i = 0; i < N; i++) e[i] = o.e[i];
  }
  MSL_FN operator vec<T, N>() const {
    vec<T, N> r;
    for (int i = 0; i < N; i++) r.e[i] = e[i];
    return r;
  }
  MSL_FN T& operator[](int i) { return e[i]; }
  MSL_FN const T& operator[](int i) const { return e[i]; }
};
#define MSL_VECTORS(T)                                                                             \
  typedef vec<T, 2> T##2;                                                                          \
  typedef vec<T, 3> T##3;                                                                          \
  typedef vec<T, 4> T##4;                                                                          \
  typedef packed_vec<T, 2> packed_##T##2;                                                          \
  typedef packed_vec<T, 3> packed_##T##3;                                                          \
  typedef packed_vec<T, 4> packed_##T##4;
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
MSL_VECTORS(bool)
#undef MSL_VECTORS

// ---- maths -------------------------------------------------------------------------------------
#define MSL_UNARY(name, expression)                                                                \
  MSL_FN float name(float x) {                                                                     \
    return (expression);                                                                           \
  }                                                                                                \
  MSL_FN half name(half v) {                                                                       \
    const float x = v;                                                                             \
    return half(expression);                                                                       \
  }                                                                                                \
  MSL_FN bfloat name(bfloat v) {                                                                   \
    const float x = v;                                                                             \
    return bfloat(expression);                                                                     \
  }                                                                                                \
  template <class T, int N>                                                                        \
  MSL_FN vec<T, N> name(vec<T, N> v) {                                                             \
    for (int i = 0; i < N; i++) v.e[i] = name(v.e[i]);                                             \
    return v;                                                                                      \
  }
#define MSL_BINARY(name, expression)                                                               \
  MSL_FN float name(float x, float y) {                                                            \
    return (expression);                                                                           \
  }                                                                                                \
  MSL_FN half name(half u, half v) {                                                               \
    const float x = u, y = v;                                                                      \
    return half(expression);                                                                       \
  }                                                                                                \
  MSL_FN bfloat name(bfloat u, bfloat v) {                                                         \
    const float x = u, y = v;                                                                      \
    return bfloat(expression);                                                                     \
  }                                                                                                \
  template <class T, int N>                                                                        \
  MSL_FN vec<T, N> name(vec<T, N> u, vec<T, N> v) {                                                \
    for (int i = 0; i < N; i++) v.e[i] = name(u.e[i], v.e[i]);                                     \
    return v;                                                                                      \
  }
#define MSL_MATHS                                                                                  \
  MSL_UNARY(exp, __builtin_expf(x))                                                                \
  MSL_UNARY(exp2, __builtin_exp2f(x))                                                              \
  MSL_UNARY(exp10, __builtin_powf(10.0f, x))                                                       \
  MSL_UNARY(log, __builtin_logf(x))                                                                \
  MSL_UNARY(log2, __builtin_log2f(x))                                                              \
  MSL_UNARY(log10, __builtin_log10f(x))                                                            \
  MSL_UNARY(sqrt, __builtin_sqrtf(x))                                                              \
  MSL_UNARY(rsqrt, 1.0f / __builtin_sqrtf(x))                                                      \
  MSL_UNARY(sin, __builtin_sinf(x))                                                                \
  MSL_UNARY(cos, __builtin_cosf(x))                                                                \
  MSL_UNARY(tan, __builtin_tanf(x))                                                                \
  MSL_UNARY(sinh, __builtin_sinhf(x))                                                              \
  MSL_UNARY(cosh, __builtin_coshf(x))                                                              \
  MSL_UNARY(tanh, __builtin_tanhf(x))                                                              \
  MSL_UNARY(asin, __builtin_asinf(x))                                                              \
  MSL_UNARY(acos, __builtin_acosf(x))                                                              \
  MSL_UNARY(atan, __builtin_atanf(x))                                                              \
  MSL_UNARY(asinh, __builtin_asinhf(x))                                                            \
  MSL_UNARY(acosh, __builtin_acoshf(x))                                                            \
  MSL_UNARY(atanh, __builtin_atanhf(x))                                                            \
  MSL_UNARY(floor, __builtin_floorf(x))                                                            \
  MSL_UNARY(ceil, __builtin_ceilf(x))                                                              \
  MSL_UNARY(rint, __builtin_rintf(x))                                                              \
  MSL_UNARY(round, __builtin_roundf(x))                                                            \
  MSL_UNARY(trunc, __builtin_truncf(x))                                                            \
  MSL_UNARY(fabs, __builtin_fabsf(x))                                                              \
  MSL_UNARY(fract, x - __builtin_floorf(x))                                                        \
  MSL_BINARY(pow, __builtin_powf(x, y))                                                            \
  MSL_BINARY(powr, __builtin_powf(x, y))                                                           \
  MSL_BINARY(atan2, __builtin_atan2f(x, y))                                                        \
  MSL_BINARY(fmod, __builtin_fmodf(x, y))                                                          \
  MSL_BINARY(copysign, __builtin_copysignf(x, y))                                                  \
  MSL_BINARY(divide, x / y)
MSL_MATHS
namespace fast {
MSL_MATHS
}
namespace precise {
MSL_MATHS
}
#undef MSL_MATHS
#undef MSL_UNARY
#undef MSL_BINARY

#define MSL_PER_ELEMENT2(name)                                                                     \
  template <class T, int N>                                                                        \
  MSL_FN vec<T, N> name(vec<T, N> a, vec<T, N> b) {                                                \
    for (int i = 0; i < N; i++) a.e[i] = name(a.e[i], b.e[i]);                                     \
    return a;                                                                                      \
  }                                                                                                \
  template <class T, int N>                                                                        \
  MSL_FN vec<T, N> name(vec<T, N> a, typename msl_plain<T>::type b) {                              \
    for (int i = 0; i < N; i++) a.e[i] = name(a.e[i], b);                                          \
    return a;                                                                                      \
  }
#define MSL_INTEGERS(T)                                                                            \
  MSL_FN constexpr T max(T a, T b) {                                                               \
    return a > b ? a : b;                                                                          \
  }                                                                                                \
  MSL_FN constexpr T min(T a, T b) {                                                               \
    return a < b ? a : b;                                                                          \
  }                                                                                                \
  MSL_FN constexpr T clamp(T x, T low, T high) {                                                   \
    return min(max(x, low), high);                                                                 \
  }
MSL_INTEGERS(char)
MSL_INTEGERS(signed char)
MSL_INTEGERS(uchar)
MSL_INTEGERS(short)
MSL_INTEGERS(ushort)
MSL_INTEGERS(int)
MSL_INTEGERS(uint)
MSL_INTEGERS(long)
MSL_INTEGERS(ulong)
#undef MSL_INTEGERS
// Like Metal's: the other argument where one is NaN.
#define MSL_FLOATS(T)                                                                              \
  MSL_FN T max(T a, T b) {                                                                         \
    return float(a) != float(a) ? b : (float(a) < float(b) ? b : a);                               \
  }                                                                                                \
  MSL_FN T min(T a, T b) {                                                                         \
    return float(a) != float(a) ? b : (float(b) < float(a) ? b : a);                               \
  }                                                                                                \
  MSL_FN T fmax(T a, T b) {                                                                        \
    return max(a, b);                                                                              \
  }                                                                                                \
  MSL_FN T fmin(T a, T b) {                                                                        \
    return min(a, b);                                                                              \
  }                                                                                                \
  MSL_FN T clamp(T x, T low, T high) {                                                             \
    return min(max(x, low), high);                                                                 \
  }                                                                                                \
  MSL_FN T saturate(T x) {                                                                         \
    return clamp(x, T(0.0f), T(1.0f));                                                             \
  }                                                                                                \
  MSL_FN T abs(T x) {                                                                              \
    return fabs(x);                                                                                \
  }                                                                                                \
  MSL_FN bool isnan(T x) {                                                                         \
    return float(x) != float(x);                                                                   \
  }                                                                                                \
  MSL_FN bool isinf(T x) {                                                                         \
    return fabs(float(x)) == INFINITY;                                                             \
  }                                                                                                \
  MSL_FN bool isfinite(T x) {                                                                      \
    return fabs(float(x)) < INFINITY;                                                              \
  }                                                                                                \
  MSL_FN bool signbit(T x) {                                                                       \
    return __builtin_signbitf(float(x)) != 0;                                                      \
  }                                                                                                \
  MSL_FN T sign(T x) {                                                                             \
    return T(float(x) > 0.0f ? 1.0f : float(x) < 0.0f ? -1.0f : 0.0f);                             \
  }                                                                                                \
  MSL_FN T mix(T a, T b, T t) {                                                                    \
    return T(float(a) + (float(b) - float(a)) * float(t));                                         \
  }                                                                                                \
  MSL_FN T fma(T a, T b, T c) {                                                                    \
    return T(__builtin_fmaf(float(a), float(b), float(c)));                                        \
  }
MSL_FLOATS(float)
MSL_FLOATS(half)
MSL_FLOATS(bfloat)
#undef MSL_FLOATS
MSL_PER_ELEMENT2(max)
MSL_PER_ELEMENT2(min)
#undef MSL_PER_ELEMENT2
MSL_FN int abs(int x) {
  return x < 0 ? -x : x;
}
MSL_FN long abs(long x) {
  return x < 0 ? -x : x;
}
namespace fast {
using metal::abs;
using metal::clamp;
using metal::fma;
using metal::fmax;
using metal::fmin;
using metal::max;
using metal::min;
}  // namespace fast
namespace precise {
using metal::abs;
using metal::clamp;
using metal::fma;
using metal::fmax;
using metal::fmin;
using metal::max;
using metal::min;
}  // namespace precise
template <class T, int N>
MSL_FN vec<T, N> clamp(vec<T, N> x, vec<T, N> low, vec<T, N> high) {
  return min(max(x, low), high);
}
template <class T, int N>
MSL_FN vec<T, N> abs(vec<T, N> a) {
  for (int i = 0; i < N; i++) a.e[i] = abs(a.e[i]);
  return a;
}
template <class T, int N>
MSL_FN vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  for (int i = 0; i < N; i++) c.e[i] = fma(a.e[i], b.e[i], c.e[i]);
  return c;
}
template <class T, int N>
MSL_FN T dot(vec<T, N> a, vec<T, N> b) {
  T sum = T(a.e[0] * b.e[0]);
  for (int i = 1; i < N; i++) sum = T(sum + a.e[i] * b.e[i]);
  return sum;
}
template <class T, int N>
MSL_FN T length(vec<T, N> a) {
  return sqrt(dot(a, a));
}
template <class T>
MSL_FN T select(T a, T b, bool c) {
  return c ? b : a;
}
template <class T, int N>
MSL_FN vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) {
  for (int i = 0; i < N; i++) a.e[i] = c.e[i] ? b.e[i] : a.e[i];
  return a;
}
MSL_FN float ldexp(float x, int n) {
  return __builtin_ldexpf(x, n);
}
MSL_FN uint popcount(uint x) {
  return uint(__builtin_popcount(x));
}
MSL_FN int popcount(int x) {
  return __builtin_popcount(uint(x));
}
MSL_FN uint clz(uint x) {
  return x ? uint(__builtin_clz(x)) : 32u;
}
MSL_FN uint ctz(uint x) {
  return x ? uint(__builtin_ctz(x)) : 32u;
}
MSL_FN int mul24(int a, int b) {
  return a * b;
}
MSL_FN uint mulhi(uint a, uint b) {
  return uint((ulong(a) * b) >> 32);
}

// ---- limits ------------------------------------------------------------------------------------
template <class T>
struct numeric_limits;
template <>
struct numeric_limits<float> {
  static constexpr bool is_signed = true, is_integer = false;
  MSL_FN static constexpr float infinity() { return INFINITY; }
  MSL_FN static constexpr float quiet_NaN() { return NAN; }
  MSL_FN static constexpr float max() { return FLT_MAX; }
  MSL_FN static constexpr float lowest() { return -FLT_MAX; }
  MSL_FN static constexpr float min() { return FLT_MIN; }
  MSL_FN static constexpr float epsilon() { return FLT_EPSILON; }
};
template <>
struct numeric_limits<half> {
  static constexpr bool is_signed = true, is_integer = false;
  MSL_FN static constexpr half infinity() { return half(INFINITY); }
  MSL_FN static constexpr half quiet_NaN() { return half(NAN); }
  MSL_FN static constexpr half max() { return half(65504.0f); }
  MSL_FN static constexpr half lowest() { return half(-65504.0f); }
  MSL_FN static constexpr half min() { return half(6.103515625e-5f); }
  MSL_FN static constexpr half epsilon() { return half(9.765625e-4f); }
};
template <>
struct numeric_limits<bfloat> {
  static constexpr bool is_signed = true, is_integer = false;
  MSL_FN static constexpr bfloat of(uint16_t bits) { return bfloat(bfloat::raw(), bits); }
  MSL_FN static constexpr bfloat infinity() { return of(0x7f80); }
  MSL_FN static constexpr bfloat quiet_NaN() { return of(0x7fc0); }
  MSL_FN static constexpr bfloat max() { return of(0x7f7f); }
  MSL_FN static constexpr bfloat lowest() { return of(0xff7f); }
  MSL_FN static constexpr bfloat min() { return of(0x0080); }
  MSL_FN static constexpr bfloat epsilon() { return of(0x3c00); }
};
#define MSL_LIMITS(T, LOW, HIGH)                                                                   \
  template <>                                                                                      \
  struct numeric_limits<T> {                                                                       \
    static constexpr bool is_signed = metal::is_signed_v<T>, is_integer = true;                    \
    MSL_FN static constexpr T max() { return HIGH; }                                               \
    MSL_FN static constexpr T min() { return LOW; }                                                \
    MSL_FN static constexpr T lowest() { return LOW; }                                             \
  };
MSL_LIMITS(bool, false, true)
MSL_LIMITS(char, -128, 127)
MSL_LIMITS(signed char, -128, 127)
MSL_LIMITS(uchar, 0, 255)
MSL_LIMITS(short, -32768, 32767)
MSL_LIMITS(ushort, 0, 65535)
MSL_LIMITS(int, -2147483647 - 1, 2147483647)
MSL_LIMITS(uint, 0u, 4294967295u)
MSL_LIMITS(long, -9223372036854775807L - 1, 9223372036854775807L)
MSL_LIMITS(ulong, 0ul, 18446744073709551615ul)
#undef MSL_LIMITS
}  // namespace metal

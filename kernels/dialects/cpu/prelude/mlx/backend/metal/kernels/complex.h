// Stands in for MLX's header of this name, whose constructors are overloaded on the address space of
// the object: what the other headers name.
#pragma once
template <class T>
struct complex_t {
  T real, imag;
  constexpr complex_t(T r = T(), T i = T()) : real(r), imag(i) {}
};
typedef complex_t<float> complex64_t;

// Stands in for MLX's header of this name, which is written with compiler intrinsics of Metal:
// bfloat has its functions from msl_types.h and msl_cpu.h.
#pragma once

// Everything is in the other stand-in.
#include "cuda_runtime.h"

/* All C kernels, as one library. */
#include "two_products.c"

#include "convolutions.c"

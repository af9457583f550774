/* All C kernels, as one library with one pool of threads. */
#include "two_products.c"

#include "convolutions.c"

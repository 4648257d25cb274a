#define ISA avx512
#define ISA_NAME "avx512"
#define ISA_TABLE avx512_table
#include "kernels.inl"

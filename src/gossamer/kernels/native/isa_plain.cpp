#define ISA plain
#define ISA_NAME "plain"
#define ISA_TABLE plain_table
#include "kernels.inl"

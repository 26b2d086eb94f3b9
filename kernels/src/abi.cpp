#include "show1/types.h"

int show1_abi(void) { return SHOW1_ABI; }

// Writes bytes to the console for ever.
#include "common.h"

        begin
        print   "go\n"
1:      out8    COM1, '.'
        jmp     1b
        routines

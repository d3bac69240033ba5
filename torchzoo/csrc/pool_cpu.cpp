// What Python calls, by its name in the library, to have the memory that waits for results given back.
#include "pool.h"

extern "C" __attribute__((visibility("default"))) uint64_t torchzoo_release_memory() {
  return torchzoo::pool().release();
}

// Which instruction set the kernels run on, for `torchzoo doctor` and the tests.
#include "cpu.h"

extern "C" __attribute__((visibility("default"))) const char* torchzoo_cpu_isa() {
  switch (torchzoo::isa()) {
    case torchzoo::Isa::avx512: return "avx512";
    case torchzoo::Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

#!/bin/sh
# Builds csrc/tests/test_kernels.cpp with address and undefined-behaviour sanitizers and runs it.
# Usage: csrc/tests/sanitize.sh [folder for the build]. CXX names the compiler (default c++).
set -e
here=$(cd "$(dirname "$0")/../cpu" && pwd)
build=${1:-$(mktemp -d)}
compiler=${CXX:-c++}
flags="-std=c++17 -O1 -g -Wno-psabi -ffp-contract=fast -fsanitize=address,undefined -fno-sanitize-recover=all"
avx2="-mavx2 -mfma -mf16c"
avx512="$avx2 -mavx512f -mavx512bw -mavx512vl -mavx512dq"
avx512bf16="$avx512 -mavx512bf16"
case $(uname -m) in x86_64 | amd64) ;; *) avx2="" avx512="" avx512bf16="" ;; esac
jobs=""
for source in driver ksg_driver step_driver product_driver dispatch parallel kernels_portable kernels_avx2 kernels_avx512 kernels_avx512bf16 ../tests/test_kernels; do
  case $source in
    kernels_avx2) extra=$avx2 ;;
    kernels_avx512) extra=$avx512 ;;
    kernels_avx512bf16) extra=$avx512bf16 ;;
    *) extra="" ;;
  esac
  $compiler $flags $extra -c "$here/$source.cpp" -o "$build/$(basename $source).o" &
  jobs="$jobs $!"
done
for job in $jobs; do wait "$job"; done
$compiler $flags "$build"/*.o -o "$build/test_kernels" -ldl -pthread
exec "$build/test_kernels"

#!/bin/sh
# Builds csrc/cuda for this CPU (csrc/tests/cuda_on_cpu.h) as the extension module _cuda, to test the kernels without a GPU.
# Usage: csrc/tests/cuda_on_cpu.sh FOLDER PYTHON [flags, such as -fsanitize=address,undefined]. CXX names the compiler (default c++).
set -e
here=$(cd "$(dirname "$0")/../cuda" && pwd)
build=$1
python=$2
shift 2
flags="-std=c++17 -O1 -g -Wall -Wextra -Werror -Wno-unknown-pragmas -fno-strict-aliasing -fPIC -fvisibility=hidden $*"
jobs=""
for source in sweep resolve; do
  ${CXX:-c++} $flags -x c++ -c "$here/$source.cu" -o "$build/$source.o" &
  jobs="$jobs $!"
done
${CXX:-c++} $flags $("$python" -m pybind11 --includes) -c "$here/module.cpp" -o "$build/module.o" &
for job in $jobs $!; do wait "$job"; done
name=_cuda$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
${CXX:-c++} $flags -shared "$build"/*.o -o "$build/$name"
echo "$build/$name"

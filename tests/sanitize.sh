#!/bin/sh
# Kernels and extensions under AddressSanitizer and UndefinedBehaviorSanitizer, each variant forced in
# turn. They are built in a copy of the tree, in the virtual environment's folder, so that ordinary
# builds stay as they are. Wants gcc: the sanitizers' runtimes are loaded before Python.
#
#     sh tests/sanitize.sh VENV [tests]
cd "$(dirname "$0")/.." || exit 1
venv=$(cd "${1:?a virtual environment is needed}" && pwd) || exit 1
shift
[ $# -gt 0 ] || set -- tests/simd tests/test_ops.py tests/test_attention.py tests/test_graph.py tests/test_autograd.py \
    tests/test_pairs.py tests/test_gguf_hostile.py
python=$venv/bin/python
tree=$venv/tree

# -p keeps the times of the files, so that only what changed is compiled again.
mkdir -p "$tree" && rm -rf "$tree/tests" &&
    tar -cf - --exclude='*.so' --exclude=__pycache__ \
        engine tools tests setup.py pyproject.toml README.md LICENSE | tar -xf - -C "$tree" &&
    cd "$tree" &&
    ENGINE_SANITIZE=1 "$python" setup.py --quiet build_clib build_ext --inplace || exit 1

# libstdc++ too: the runtime looks for its exceptions before any module has loaded it.
for library in libasan.so libubsan.so libstdc++.so.6; do
    preload="$preload $(gcc -print-file-name=$library)"
done
# Python frees little before it ends, so leaks say nothing; its own allocator would hide overruns.
sanitized() {
    LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
        UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 "$@"
}

variants=$(sanitized "$python" -c 'import engine; print(*engine.isas())') || exit 1
status=0
for isa in $variants; do
    echo "== ENGINE_ISA=$isa"
    ENGINE_ISA=$isa sanitized "$python" -m pytest -q -p no:cacheprovider "$@" || status=1
done
exit $status

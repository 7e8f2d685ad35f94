#!/bin/sh
# Every check that needs no model: a line for each, going on after a failure; status 1 if any failed.
# The tools come from PATH, as `make lint` sets it.
cd "$(dirname "$0")/.." || exit 1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
status=0

check() { # name, command ...: what the command says is shown only if it fails
    name=$1
    shift
    if "$@" >"$work/output" 2>&1; then
        echo "ok      $name"
    else
        echo "FAILED  $name: $*"
        cat "$work/output"
        status=1
    fi
}

# A build from nothing with -Werror for the kernels; what Cython or the C compiler of the extensions
# has to say is a failure too.
clean_build() {
    mkdir "$work/tree" && cp -r engine tools setup.py pyproject.toml README.md LICENSE "$work/tree" &&
        find "$work/tree" -name '*.so' -delete &&
        (cd "$work/tree" && ENGINE_WERROR=1 python setup.py --quiet build_clib build_ext) \
            >"$work/build" 2>&1 || { cat "$work/build"; return 1; }
    ! grep -A 4 -E 'warning:|performance hint' "$work/build"
}

compiled_modules_match_their_stubs() {
    python setup.py --quiet build_clib build_ext --inplace &&
        PYTHONPATH=$PWD stubtest engine --concise --ignore-disjoint-bases --allowlist tests/stubtest_allowlist.txt \
            --mypy-config-file pyproject.toml
}

check ruff ruff check
check ruff-format ruff format --check
check cython-lint cython-lint engine tests/cython
check clang-format clang-format --dry-run -Werror engine/simd/*.[ch]
check codespell codespell
check mypy mypy
check stubtest compiled_modules_match_their_stubs
check build clean_build
exit $status

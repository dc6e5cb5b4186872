#!/usr/bin/env bash
# Builds, tests and benchmarks clustops on a machine with a GPU, in at most 10 minutes.
#
#   benchmarks/gpu.sh OUT             logs, JSON, pictures and summary.txt go to the folder OUT
#   benchmarks/gpu.sh --dry-run OUT   only lists the steps and their limits; needs no GPU
#
# PYTHON names the interpreter (default python3). It has torch with CUDA, setuptools, pybind11, cmake, ninja,
# pytest and hypothesis; nvcc is on PATH or under CUDA_HOME; nothing is downloaded. A step that fails, or that
# its limit stops, does not keep the later ones from running.
# Exit status: 0 every step passed, 1 one did not, 2 wrong arguments, 3 no GPU.
set -uo pipefail

usage() {
    echo "usage: benchmarks/gpu.sh [--dry-run] OUT" >&2
    exit 2
}

dry_run=0
if [ "${1:-}" = "--dry-run" ]; then
    dry_run=1
    shift
fi
[ $# -eq 1 ] && [ -n "$1" ] && [ "${1#-}" = "$1" ] || usage

python=${PYTHON:-python3}
out=$(realpath -m -- "$1")
log=$out/gpu.log
summary=$out/summary.txt
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
failures=0

why_no_gpu() {
    if ! command -v nvidia-smi >/dev/null; then
        echo "nvidia-smi is not on PATH"
    elif ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
        echo "nvidia-smi lists none"
    elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        echo "torch.cuda.is_available() is not True in $python"
    fi
}

# step NAME LIMIT PURPOSE COMMAND...: run it for LIMIT seconds at most; a line in the summary, output in the log.
step() {
    local name=$1 limit=$2 purpose=$3
    shift 3
    if [ "$dry_run" = 1 ]; then
        printf '%-11s at most %3d s  %s\n' "$name" "$limit" "$purpose"
        return
    fi
    echo "== $name: $purpose" | tee -a "$log"
    local before started=$SECONDS status verdict
    before=$(wc -l <"$log")
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$log"
    status=${PIPESTATUS[0]}
    case $status in
        0) verdict=passed ;;
        124 | 137) verdict="OUT OF TIME, limit $limit s" ;;
        *) verdict="FAILED, status $status" ;;
    esac
    printf '%-11s %4d s  %s\n' "$name" $((SECONDS - started)) "$verdict" >>"$summary"
    if [ "$status" -ne 0 ]; then
        failures=$((failures + 1))
        tail -n "+$((before + 1))" "$log" | tail -n 5 | cut -c -150 | sed 's/^/    /' >>"$summary"
    fi
}

# pip counts the kernels as optional and succeeds without them; here a build without CUDA is a failure.
build() {
    "$python" -m pip install --no-build-isolation --no-deps --verbose -e . &&
        "$python" -c '
import json, sys
info = json.load(open("clustops/native/build_info.json"))
print("built:", info)
sys.exit(not info["cuda"])'
}

sanitize() {
    for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" -m pytest -q -m cuda -k small_shapes tests || return
    done
}

if [ "$dry_run" = 0 ]; then
    reason=$(why_no_gpu)
    if [ -n "$reason" ]; then
        echo "no GPU visible: $reason" >&2
        exit 3
    fi
    mkdir -p "$out" || exit 2
    : >"$log"
    {
        echo "clustops on $(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | head -n 1)"
        echo "commit $(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown), $(date -u +%FT%TZ)"
        echo
    } >"$summary"
fi

export python PYTHONUNBUFFERED=1 PIP_BREAK_SYSTEM_PACKAGES=1 CLUSTOPS_CUDA=1
export -f build sanitize

step build 150 "pip install -e . with CUDA kernels for the visible GPU" bash -c build
step cuda-tests 110 "pytest -m cuda" "$python" -m pytest -q -m "cuda and not slow" tests
if [ "$dry_run" = 1 ] || command -v compute-sanitizer >/dev/null; then
    step sanitizer 70 "compute-sanitizer memcheck, racecheck: CUDA tests on small shapes" bash -c sanitize
else
    echo "sanitizer        skipped: compute-sanitizer is not on PATH" >>"$summary"
fi
step benchmarks 180 "python -m benchmarks --suite cuda" \
    "$python" -m benchmarks --suite cuda --seconds 1 --minutes 2.5 --out "$out"
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
step cpu-tests 60 "pytest, all other tests" \
    env OMP_NUM_THREADS=1 "$python" -m pytest -q -x "${workers[@]}" -m "not cuda and not slow" tests
[ "$dry_run" = 1 ] && exit 0

{
    echo
    grep -A 12 -E '^[a-z]+: targets met' "$log" | grep -E '^([a-z]+: targets met|  (missed|slower|FAILED) )'
    echo
    echo "tables: $(basename "$log"); numbers and pictures: $(cd "$out" && echo cuda-*)"
    [ "$failures" -eq 0 ] && echo "every step passed" || echo "$failures steps did not pass"
} | cut -c -150 | head -n 60 >>"$summary"
echo
cat "$summary"
[ "$failures" -eq 0 ]

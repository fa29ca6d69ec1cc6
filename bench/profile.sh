#!/usr/bin/env bash
# Profiles one forward call: where its time goes (nsys), what its kernels move (ncu), into a folder.
#
#   bench/profile.sh OUTPUT [arguments of bench_stages.py: one shape, quant and topk]
#   bench/profile.sh profile --shape wan14b-720p --quant none    (default: wan1.3b-480p, int8_fp8)
#
# nsys.txt    time by NVTX range and by kernel        nsys.nsys-rep  the trace
# stages.txt  kernels against budgets and counts      stages.json    the same
# ncu.txt     every section of ncu for each kernel    ncu.ncu-rep    the report
# What a missing tool would have written is left out, and said; nothing at all is exit code 1.
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
  sed -n '2,5p' "$0" >&2
  exit 2
fi
output=$1
shift
[[ " $* " == *" --shape "* ]] || set -- --shape wan1.3b-480p "$@"
stages=(python "$(dirname "$0")/bench_stages.py" "$@")
mkdir -p "$output"
done_any=0

have() {
  command -v "$1" > /dev/null && return
  echo "profile.sh: $1 is not on PATH: left out" >&2
  return 1
}

if have nsys; then
  SLA2_NVTX=1 nsys profile --trace cuda,nvtx --force-overwrite true --output "$output/nsys" \
    "${stages[@]}" --once
  nsys stats --force-export true --report nvtx_gpu_proj_sum,cuda_gpu_kern_sum \
    "$output/nsys.nsys-rep" > "$output/nsys.txt"
  done_any=1
fi

if have ncu; then
  # The first call of a process: the bytes do not depend on what is warm but the caches' contents.
  ncu --csv --log-file "$output/bytes.csv" --cache-control none --kernel-name-base demangled \
    --kernel-name regex:sla2:: --metrics dram__bytes_read.sum,dram__bytes_write.sum \
    "${stages[@]}" --once
  "${stages[@]}" --ncu-bytes "$output/bytes.csv" --output "$output" | tee "$output/stages.txt"
  ncu --set full --force-overwrite --export "$output/ncu" --kernel-name-base demangled \
    --kernel-name regex:sla2:: "${stages[@]}" --once
  ncu --import "$output/ncu.ncu-rep" > "$output/ncu.txt"
  done_any=1
fi

[[ $done_any == 1 ]] || exit 1
echo "profile.sh: wrote $output"

#!/usr/bin/env bash
# The main job on one device: raw rows to a trained, evaluated DLRM and its predictions.
#
#   bash test/train_full_1p.sh [--data_path=DIR] [flags of the reference implementation]
#
# DIR holds Criteo's train.txt, and maybe test.txt; without it, data of the same shape is made up.
# Flags come after the recipe below, and the last one wins: --learning-rate=0.2 --use-npu …
# What it makes goes to output/ in this repository; DIR is only read. It sets itself up first.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() { # SCRIPT: print the comment that it begins with
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"
  echo
  echo 'The flags of the reference, and what they do here: .venv/bin/dlrm reference --help'
  echo '(bash test/setup.sh makes .venv), or docs/reference.md.'
}

data_path=
synthetic=yes
flags=()
while (($#)); do
  case $1 in
    -h | --help)
      usage "${usage_of:-$0}"
      exit 0
      ;;
    --data_path=* | --data-path=*) data_path=${1#*=} synthetic= ;;
    --data_path | --data-path)
      data_path=${2-} synthetic=
      shift
      ;;
    *) flags+=("$1") ;;
  esac
  shift || break
done
if [[ -z $synthetic && ! -f $data_path/train.txt ]]; then
  echo "--data_path must name a folder that holds train.txt; there is none in '$data_path'" >&2
  exit 2
fi

bash "$root/test/setup.sh"
dlrm() { "$root/.venv/bin/python" -m dlrm "$@"; }

if [[ $synthetic ]]; then
  data_path=$root/output/synthetic
  # Does nothing if they are there already.
  dlrm synthesize "$data_path" --rows 500000 --test-rows 50000 >/dev/null
  name=synthetic
else
  data_path=$(cd "$data_path" && pwd)
  # Two folders of one name must not share what was prepared.
  name=$(basename "$data_path")-$(cksum <<<"$data_path" | cut -d ' ' -f 1)
fi
work=$root/output/$name-1p
number=1
while [[ -e $work/run-$number ]]; do number=$((number + 1)); done
run=$work/run-$number
mkdir -p "$work"

# The recipe of the published figures: architecture, loss, rate, batch and evaluation interval are
# those of the Ascend adaptation and of the reference's own bench/dlrm_s_criteo_kaggle.sh.
dlrm reference --run="$run" \
  --arch-sparse-feature-size=16 --arch-mlp-bot=13-512-256-64-16 --arch-mlp-top=512-256-1 \
  --data-generation=dataset --data-set=kaggle \
  --raw-data-file="$data_path/train.txt" \
  --processed-data-file="$work/kaggleAdDisplayChallenge_processed.npz" \
  --loss-function=bce --round-targets=True --learning-rate=0.1 \
  --nepochs=1 --mini-batch-size=128 --test-mini-batch-size=16384 \
  --mlperf-logging --test-freq=10240 --print-freq=100 --print-time \
  ${flags[@]+"${flags[@]}"}

if [[ -s $data_path/test.txt ]]; then
  # By the checkpoint that the last test was of, not by the one that chose itself on test.
  dlrm predict "$run" "$data_path/test.txt" "$run/submission.csv" --checkpoint newest >/dev/null
  echo "predictions of test.txt: $run/submission.csv"
fi
# With --inference-only nothing was trained, and there is no result for a table.
[[ -f $run/result.json ]] || exit 0
echo
"$root/.venv/bin/python" -c '
import sys
from pathlib import Path
from dlrm.seed_table import describe
sys.stdout.write(describe(*map(Path, sys.argv[1:])))
' "$run" ${synthetic:+"$data_path/truth.json"}

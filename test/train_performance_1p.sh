#!/usr/bin/env bash
# The throughput run: test/train_full_1p.sh, stopped after 1000 steps.
#
#   bash test/train_performance_1p.sh [--data_path=DIR] [flags of the reference implementation]
usage_of=${BASH_SOURCE[0]} exec bash "$(dirname "${BASH_SOURCE[0]}")/train_full_1p.sh" --step=1000 "$@"

#!/usr/bin/env bash
# Check and test everything, exactly as CI does; every check runs, and the failed ones are named.
#
#   bash test/run_tests.sh [--long] [options of pytest]
#
# --long adds the tests that take minutes. With DLRM_TEST_DATA naming a folder that holds golden/
# and criteo/, the tests that compare with the reference implementation and with real rows run too.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
bash test/setup.sh --dev || exit
export PATH=$PWD/.venv/bin:$PATH
# Threads that wait for each other let others compute. By default they spin, which makes small
# trainings many times slower where something else is running.
export OMP_WAIT_POLICY=passive

failed=()
check() { # COMMAND…
  echo "== $*"
  "$@" || failed+=("$*")
}

check ruff format --check
check ruff check
check mypy
check mypy benchmarks
check lint-imports
check codespell
# Two at a time, since most tests compute on one thread; with more, those that compute on all cores
# would wait for each other. Last, so that its summary closes the output.
check pytest --numprocesses 2 --dist worksteal "$@"

if ((${#failed[@]})); then
  printf 'FAILED: %s\n' "${failed[@]}" >&2
  exit 1
fi

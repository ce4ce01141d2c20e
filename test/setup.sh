#!/usr/bin/env bash
# Make the virtual environment .venv of this repository, or find that it is made already.
#
#   bash test/setup.sh          what running takes
#   bash test/setup.sh --dev    and what checking takes
#
# Environment: PYTHON            the interpreter to make it with (default: python3)
#              DLRM_TORCH_INDEX  the package index to take torch from (default: pip's own)
#
# A torch that can be imported already (a vendor's build for CUDA or an NPU) is kept, whatever its
# version. Exit status: 0 ready, 2 wrong usage, 3 the environment could not be made.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=${PYTHON:-python3}

fail() { # MESSAGE: end with the status of a faulty environment
  echo "setup: $1" >&2
  exit 3
}

case "${1-}" in
  "") profile=run ;;
  --dev) profile=dev ;;
  *)
    echo "setup: unknown option $1; known: --dev" >&2
    exit 2
    ;;
esac

# What an environment was made of. It is written last, so that an interrupted installation has none.
# The path counts, since the programs in .venv/bin name their interpreter by it.
ingredients() { # PROFILE
  local files=(test/setup.sh setup.py pyproject.toml requirements.txt)
  [[ $1 == run ]] || files+=(requirements-dev.txt)
  (echo "$root" && cd "$root" && cat "${files[@]}" native/*) | sha256sum
}

runs() { "$venv/bin/python" "$@" >/dev/null 2>&1; }

is_ready() {
  [[ $(cat "$venv/.ready-$profile" 2>/dev/null) == "$(ingredients "$profile")" ]] && runs -c ''
}

is_ready && exit 0

command -v "$python" >/dev/null ||
  fail "there is no $python. Install Python 3.11 or newer, or name one: PYTHON=/path/to/python3.11"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
  fail "$python does not run: see above"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$python is Python $version; 3.11 or newer is needed. Name one: PYTHON=/path/to/python3.11"

# Two at once: the second waits, and then finds everything done.
exec 9>"$root/.venv.lock" || fail "cannot write to $root, where .venv has to be made"
if ! flock --nonblock 9; then
  echo "setup: waiting for another setup of $root" >&2
  flock 9
  is_ready && exit 0
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT

stage() { # NAME COMMAND…: run it quietly, say how long it took, and show its output if it fails
  local name=$1 began=$SECONDS
  shift
  printf 'setup: %s … ' "$name" >&2
  if ! "$@" >"$log" 2>&1; then
    echo "failed" >&2
    tail -n 15 "$log" | sed 's/^/    /' >&2
    fail "$name failed: see above. Check network, disk space and package index; then try again."
  fi
  echo "$((SECONDS - began)) s" >&2
}

install() {
  # While the mark is there, packages may be half unpacked and yet look installed. A pip that fails
  # by itself has cleaned up.
  local status=0
  touch "$venv/.installing"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
    --root-user-action=ignore "$@" || status=$?
  ((status >= 128)) || rm "$venv/.installing"
  return "$status"
}

torch_version() { (cd "$root" && "$1" -c 'import torch; print(torch.__version__)' 2>/dev/null); }

# An environment that was left half made, or has moved, is made anew; any other is brought up to date.
made_at=$(cat "$venv/.root" 2>/dev/null || echo "$root")
if [[ -e $venv/.installing || $made_at != "$root" ]] || ! runs -m pip --version; then
  # Of an activated environment, the interpreter it was made from is what .venv will be made from.
  base=$("$python" -c 'import sys; print(sys._base_executable)')
  torch_version "$base" >/dev/null && sees_system=--system-site-packages || sees_system=
  stage "making .venv" "$base" -m venv --clear $sees_system "$venv"
fi
rm -f "$venv"/.ready-*
echo "$root" >"$venv/.root"

# A torch that this script installed follows its pin; one that came otherwise stays.
pin=$(grep '^torch==' "$root/requirements.txt")
if [[ ! -e $venv/.torch ]] && found=$(torch_version "$venv/bin/python"); then
  echo "setup: keeping torch $found, which is there already ($pin is what is tested)" >&2
elif [[ $(cat "$venv/.torch" 2>/dev/null) != "$pin" ]]; then
  stage "installing $pin" install ${DLRM_TORCH_INDEX:+--index-url "$DLRM_TORCH_INDEX"} "$pin"
  echo "$pin" >"$venv/.torch"
fi

grep -v '^torch==' "$root/requirements.txt" >"$venv/requirements.txt"
stage "installing what dlrm needs" install -r "$venv/requirements.txt"
if [[ $profile == dev ]]; then
  stage "installing the tools that check it" install -r "$root/requirements-dev.txt"
fi
stage "installing dlrm" install --no-deps --no-build-isolation --editable "$root"

ingredients run >"$venv/.ready-run"
[[ $profile == run ]] || ingredients dev >"$venv/.ready-dev"

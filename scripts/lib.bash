# Sourced by the scripts beside it. They run from the repository's root and fail with one line that says what to do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p build/log

fail() {
  echo "${0##*/}: $*" >&2
  exit 1
}

# apt_get ARGUMENTS...: as root, without questions.
apt_get() {
  local as_root=()
  command -v apt-get >/dev/null || fail "this host has no apt-get; do by its own means: apt-get $*"
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || fail "not root and no sudo; run as root: apt-get $*"
    as_root=(sudo)
  fi
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 "$@"
}

# logged NAME COMMAND...: a step whose output goes to build/log/NAME.log. It fails on a warning too: SwiftPM prints the
# errors of its import check, and the linker its warnings, and exits with 0. (Warnings about the toolchain's own static
# libraries are not ours to mend.)
logged() {
  local log="build/log/$1.log" status=0 complaints
  shift
  echo "${0##*/}: $*"
  "$@" >"$log" 2>&1 || status=$?
  complaints=$(grep -E '(warning|error): ' "$log" | grep -v '/swift_static/' | sort -u | head -n 30) || true
  [ "$status" -eq 0 ] && [ -z "$complaints" ] && return
  [ "$status" -eq 0 ] || tail -n 30 "$log" >&2
  [ -z "$complaints" ] || echo "$complaints" >&2
  fail "'$*' ended with status $status${complaints:+ and complaints}; all of its output is in $log"
}

build_release() {
  # No library is to be looked for beside the executable, in a dozen folders that are not there.
  logged build-release swift build -c release --static-swift-stdlib --disable-local-rpath --product swiftvmm \
    --explicit-target-dependency-import-check error
}

# Sourced by ./check and ./demo: installs the Debian or Ubuntu packages that are missing. Needs root or sudo only then.
packages=(g++ cmake ninja-build pkg-config ccache
  libfmt-dev nlohmann-json3-dev libcli11-dev libtomlplusplus-dev libhwy-dev
  libutf8proc-dev libzstd-dev libprotobuf-dev protobuf-compiler libboost-dev libssl-dev)

install_packages() {
  local missing=() name
  for name in "${packages[@]}" "$@"; do
    dpkg-query -W -f='${Status}' "$name" 2>/dev/null | grep -q 'ok installed' || missing+=("$name")
  done
  [ ${#missing[@]} -eq 0 ] && return
  local root=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo "missing packages, and no sudo to install them: ${missing[*]}" >&2; exit 1; }
    root=(sudo)
  fi
  echo "installing ${missing[*]}"
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

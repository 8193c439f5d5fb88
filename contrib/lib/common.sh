# What the scripts here share: saying what they do, finding cargo, installing Debian packages. To be sourced.

say() { printf '\n== %s\n' "$*"; }
note() { printf '   %s\n' "$*"; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# Prints the comment at the top of a script: its help.
show_help() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"; }

# Finds cargo, also where rustup put it and no shell was told.
need_cargo() {
  if ! command -v cargo >/dev/null && [ -f "${CARGO_HOME:-$HOME/.cargo}/env" ]; then
    # shellcheck disable=SC1091
    . "${CARGO_HOME:-$HOME/.cargo}/env"
  fi
  command -v cargo >/dev/null || die "cargo is not here; install Rust first: https://rustup.rs"
}

# install_missing COMMAND:PACKAGE... installs the packages whose command is missing; goes on where it cannot.
install_missing() {
  local pair missing=() as_root=()
  for pair in "$@"; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
  done
  [ "${#missing[@]}" -gt 0 ] || { note "nothing is missing"; return 0; }
  # Several commands may come from one package.
  mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
  if ! command -v apt-get >/dev/null; then
    note "missing, and no apt-get to install it: ${missing[*]}"
    return 0
  fi
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { note "missing, and neither root nor sudo: ${missing[*]}"; return 0; }
    as_root=(sudo)
  fi
  note "installing: ${missing[*]}"
  # --no-remove: never break what is installed for the sake of a test.
  if ! { "${as_root[@]}" apt-get update -qq &&
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
      apt-get install -y -qq --no-remove --no-install-recommends "${missing[@]}"; } >/dev/null; then
    note "apt-get could not install them; going on without: ${missing[*]}"
  fi
}

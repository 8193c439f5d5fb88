# Debian packages that tests unpack into a folder of their own, and never install. To be sourced, after common.sh, with
# `cache` naming that folder. apt gets a configuration of its own, with sources, lists and archives there, and checks
# signatures as always.

keyring=/usr/share/keyrings/debian-archive-keyring.gpg

# need_packages WHAT TOOL...: whether packages can be unpacked here; and no two at the same time.
need_packages() {
  local what=$1 tool
  shift
  [ "$(uname -m)" = x86_64 ] || die "$what is for x86_64"
  for tool in apt-get dpkg-deb "$@"; do
    command -v "$tool" >/dev/null || die "$tool is missing: $what is made of Debian packages"
  done
  [ -r "$keyring" ] || die "$keyring is missing; install debian-archive-keyring"
  mkdir -p "${cache:?}"
  exec 9>"$cache/lock"
  flock 9
}

# archive: where this host takes Debian's own packages from; its usual place where that cannot be learnt (a host that is no
# Debian, or has never fetched its lists).
archive() {
  local uri
  # shellcheck disable=SC2016 # apt's own variable
  uri=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' 2>/dev/null |
    head -1) || true
  echo "${uri:-http://deb.debian.org/debian}"
}

# apt_with NAME SUITE...: an apt configuration of its own, as the words of `${apt[@]}`.
apt_with() {
  local root=$cache/apt/$1 line from
  shift
  from=$(archive)
  mkdir -p "$root"/{lists/partial,archives/partial}
  for line in "$@"; do
    printf 'deb [signed-by=%s] %s %s main\n' "$keyring" "$from" "$line"
  done >"$root/sources.list"
  apt=(-qq -o "Dir::Etc::sourcelist=$root/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$root/lists"
    -o "Dir::Cache::archives=$root/archives" -o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache="
    -o Dir::State::status=/dev/null -o APT::Architecture=amd64 -o APT::Install-Recommends=0
    -o "APT::Sandbox::User=$(id -un)" -o Debug::NoLocking=1)
  apt-get "${apt[@]}" update
}

# get PACKAGE OPTION...: downloads one package into the present folder.
get() { (umask 022 && apt-get "${apt[@]}" download "$@"); }

# closure OPTION... PACKAGE...: these packages and all that they depend on, less what this host has.
closure() {
  local name
  apt-get "${apt[@]}" -y --simulate install "$@" | awk '$1 == "Inst" {print $2}' | while read -r name; do
    dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null | grep -qx installed || echo "$name"
  done
}

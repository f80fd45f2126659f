# shellcheck shell=bash
# Sourced by the other scripts: makes and activates a virtual environment of this checkout, which is kept until setup.py changes.
# usage: environment EXTRA [PYTHON]     installs xomni_jax[EXTRA]; PYTHON is also searched where pyenv and uv install interpreters
environment() {
  local extra=$1 wanted=${2:-} candidate found="" stamp
  for candidate in ${wanted:-python3.11 python3.12 python3.13 python3} \
    ${wanted:+"$HOME"/.pyenv/versions/*/bin/"$wanted" "$HOME"/.local/share/uv/python/*/bin/"$wanted"}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then found=$candidate; break; fi
  done
  if [ -z "$found" ]; then
    echo "no Python 3.11 to 3.13 found${wanted:+ as $wanted}; install one, or name it with --python" >&2
    return 2
  fi
  local home=${XOMNI_VENV:-.venv}
  [ -z "$wanted" ] || home=$home-$(basename "$wanted")
  [ -x "$home/bin/python" ] || "$found" -m venv "$home"
  # shellcheck disable=SC1091
  . "$home/bin/activate"
  stamp="$home/installed-$extra-$(cksum < setup.py | cut -d' ' -f1)"
  if [ ! -f "$stamp" ]; then
    echo "installing xomni_jax[$extra] into $home (once, this takes minutes)"
    python -m pip install --quiet --disable-pip-version-check -e ".[$extra]"
    touch "$stamp"
  fi
}

# For training on a CPU: keeps freed memory in the process. A step allocates and frees hundreds of MB, and page faults take much of its time.
keep_memory() {
  export MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
  export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
}

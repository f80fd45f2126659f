#!/usr/bin/env bash
# launch/queued_resource.sh runs this on every host of a slice, from the unpacked archive. Not for use by hand.
#   bash launch/on_host.sh install BUCKET                          Python, the package with libtpu, the bucket at /bucket
#   bash launch/on_host.sh start FOLDER SLICE SLICES -- COMMAND    starts COMMAND once, detached; FOLDER of the bucket gets its log and exit code
set -euo pipefail
cd "$(dirname "$0")/.."
bucket=${XOMNI_BUCKET:-/bucket}
export XOMNI_VENV=$HOME/xomni/venv
GCSFUSE=3.7.1

find_python() {  # sets python; the 3.10 of the images is too old
  local candidate
  for candidate in python3.12 python3.13 python3.11; do
    if command -v "$candidate" > /dev/null; then python=$candidate; return; fi
  done
  python3 -m pip install --quiet --user uv
  export PATH="$HOME/.local/bin:$PATH"
  uv python install --quiet 3.12
  python=$(uv python find --managed-python 3.12)
}

mount_bucket() {  # NAME
  ! mountpoint -q "$bucket" || return 0
  if ! command -v gcsfuse > /dev/null; then
    local package=gcsfuse_${GCSFUSE}_amd64.deb
    curl -fsSL -o "/tmp/$package" "https://github.com/GoogleCloudPlatform/gcsfuse/releases/download/v$GCSFUSE/$package"
    sudo dpkg --install "/tmp/$package" > /dev/null
  fi
  sudo mkdir -p "$bucket" && sudo chown "$(id -u)" "$bucket"
  # A host must see at once what another has just written, so do not cache that a file does not exist.
  gcsfuse --implicit-dirs --metadata-cache-negative-ttl-secs=0 "$1" "$bucket" > /dev/null
}

install() {  # BUCKET
  mount_bucket "$1"
  find_python
  . launch/environment.sh
  environment tpu "$python"
  readlink -f "$(dirname "$(command -v python)")" > "$HOME/xomni/bin"  # where start finds this environment
}

end_previous() {  # ends what an earlier start left running, since a chip can be used by one process only
  local group
  [ -f "$HOME/xomni/group" ] || return 0
  group=$(< "$HOME/xomni/group")
  kill -TERM -- "-$group" 2> /dev/null || return 0
  for _ in $(seq 120); do
    kill -0 -- "-$group" 2> /dev/null || return 0
    sleep 0.5
  done
  kill -KILL -- "-$group" 2> /dev/null || true
}

start() {  # FOLDER SLICE SLICES -- COMMAND
  local folder=$1 slice=$2 slices=$3
  shift 4
  # A connection may break after the command has been started; the launcher then connects again.
  [ ! -f "$HOME/xomni/folder" ] || [ "$(< "$HOME/xomni/folder")" != "$folder" ] || return 0
  end_previous
  mkdir -p "$bucket/$folder"
  PATH="$(< "$HOME/xomni/bin"):$PATH"
  export PATH PYTHONPATH=$PWD PYTHONUNBUFFERED=1
  [ -n "${LIBTPU_INIT_ARGS+set}" ] || LIBTPU_INIT_ARGS=$(python -m xomni_jax.sharding.xla_flags "$slice" --slices "$slices")
  export LIBTPU_INIT_ARGS
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$bucket/xla}
  export XOMNI_STOPPED_CODE=75  # exit code of a run that was stopped and has saved
  local secrets=$HOME/.xomni_secrets
  if [ -f "$secrets" ]; then
    set -a
    # shellcheck disable=SC1090
    . "$secrets"
    set +a
    rm -f "$secrets"
  fi
  setsid nohup bash launch/on_host.sh supervise "$folder" "$@" > /dev/null 2>&1 < /dev/null &
  echo "$!" > "$HOME/xomni/group"
  touch "$bucket/$folder/$(hostname).started"
  echo "$folder" > "$HOME/xomni/folder"
}

supervise() {  # FOLDER COMMAND
  local name log code=0 child
  name=$(hostname) log=$HOME/xomni/$(basename "$1").log
  local copy=$bucket/$1/$name
  shift
  echo "$(date -u +%FT%TZ) $name: $*; LIBTPU_INIT_ARGS=$LIBTPU_INIT_ARGS" > "$log"
  "$@" >> "$log" 2>&1 &
  child=$!
  trap 'kill -TERM "$child" 2> /dev/null || true' TERM  # the machine is taken away: the command saves, and its exit code is kept
  while kill -0 "$child" 2> /dev/null; do
    cp "$log" "$copy.log" || true
    for _ in $(seq 30); do
      kill -0 "$child" 2> /dev/null || break
      sleep 1
    done
  done
  wait "$child" || code=$?
  echo "$(date -u +%FT%TZ) $name: exit code $code" >> "$log"
  cp "$log" "$copy.log" || true
  touch "$copy.exit-$code"
}

"$@"

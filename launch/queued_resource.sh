#!/usr/bin/env bash
# Trains on a TPU slice through queued resources: one command from nothing to a finished run.
#
#   bash launch/queued_resource.sh run NAME --accelerator v6e-64 --zone us-east5-b --bucket my-bucket [options] -- COMMAND
#
#   run      request the slice, wait for it, ship this commit, install it, start COMMAND on every host, and show its log. If the slice is
#            taken away (SUSPENDED), request it again and restart: COMMAND resumes from its newest checkpoint. When COMMAND has finished,
#            delete the slice. The same command attaches again to what is running, so you may close the terminal.
#   status   state of the slice, and which hosts have started and ended
#   logs     copy the logs of every start from the bucket to logs/NAME, and show the end of the newest one
#   delete   delete the slice, whatever runs on it
#
#   --accelerator TYPE   v4-8, v5litepod-16, v5p-64, v6e-64 ...: the name that the cloud uses (tpu7x through GKE only: launch/gke)
#   --zone Z             zone of the slice; also --project P if gcloud has no default
#   --bucket B           gs://B, in the region of the slice, with hierarchical namespace; every host mounts it at /bucket:
#                        COMMAND reads models from /bucket/... and writes its run there, where the next slice finds it
#   --spot | --reserved  cheap, but taken away at any time; or from a reservation. Without either: on demand
#   --slices N           N slices that train together (multislice); --accelerator is the type of each
#   --secret NAME        pass the environment variable NAME of this shell to COMMAND; may be repeated. Never printed or put in the bucket
#   --retries N          restart COMMAND up to N times after it failed on a healthy slice (default 3). Exit code 2, a mistake in the
#                        command line, is not retried; when the slice is taken away, COMMAND is always restarted
#   --keep               do not delete the slice at the end
#   --poll S             seconds between checks of the state (default 30)
#   --dry-run            print the gcloud commands instead of running them
#
# example (a small spot slice, the tiny model):
#   bash launch/queued_resource.sh run tiny --accelerator v5litepod-16 --zone us-west4-a --bucket my-bucket --spot --dry-run -- \
#     xomni train --distributed --config=configs/tiny/sft.py --config.init_from=xomni_jax/assets/tiny_sft --config.next_token.rows=16 \
#     --config.mesh.data=4 --config.mesh.fsdp=4 --config.run_dir=/bucket/runs/tiny
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "$(date +%T) $*"; }
die() { echo "queued_resource.sh: $*" >&2; exit 2; }

# ---- the command line ----
if [ $# = 0 ] || [ "$1" = -h ] || [ "$1" = --help ]; then
  sed -n '/^# Trains/,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"
  exit 0
fi
verb=$1 name="" accelerator="" zone="" project="" bucket="" tier=() slices=1 secrets=() retries=3 keep="" poll=30 dry="" command=()
shift
case $verb in run|status|logs|delete) ;; *) die "unknown command $verb; use run, status, logs or delete" ;; esac
while [ $# -gt 0 ]; do
  case $1 in
    --accelerator|--zone|--project|--bucket|--slices|--secret|--retries|--poll)
      [ $# -gt 1 ] && [ "$2" != -- ] || die "$1 needs a value" ;;&
    --accelerator) accelerator=$2; shift 2 ;;
    --zone) zone=$2; shift 2 ;;
    --project) project=$2; shift 2 ;;
    --bucket) bucket=${2#gs://} bucket=${bucket%/}; shift 2 ;;
    --slices) slices=$2; shift 2 ;;
    --secret) secrets+=("$2"); shift 2 ;;
    --retries) retries=$2; shift 2 ;;
    --poll) poll=$2; shift 2 ;;
    --spot|--reserved) tier+=("$1"); shift ;;
    --keep) keep=1; shift ;;
    --dry-run) dry=1; shift ;;
    --) shift; command=("$@"); break ;;
    -*) die "unknown option $1; see --help" ;;
    *) [ -z "$name" ] || die "there are two names, $name and $1; write the command to run after --"; name=$1; shift ;;
  esac
done
[[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] || die "the name ${name:-is missing; it} must be lower-case letters, digits and dashes, such as grpo-1"
[ -n "$zone" ] || die "--zone is missing, such as --zone us-east5-b"
[ "$verb" = delete ] || [ -n "$bucket" ] || die "--bucket is missing; logs, code and the run itself go there"
for number in "$slices" "$retries" "$poll"; do [[ $number =~ ^[0-9]+$ ]] || die "$number is no number; see --help for --slices, --retries and --poll"; done
if [ "$verb" = run ]; then
  case $accelerator in
    v4-[0-9]*) image=tpu-ubuntu2204-base ;;
    v5litepod-[0-9]*) image=v2-alpha-tpuv5-lite ;;
    v5p-[0-9]*) image=v2-alpha-tpuv5 ;;
    v6e-[0-9]*) image=v2-alpha-tpuv6e ;;
    tpu7x-*|v7*) die "--accelerator $accelerator comes through GKE only; see launch/README.md" ;;
    *) die "--accelerator ${accelerator:-is missing; it} must be v4-N, v5litepod-N, v5p-N or v6e-N, such as v6e-64" ;;
  esac
  [ "$slices" -ge 1 ] || die "--slices $slices must be at least 1"
  [ ${#tier[@]} -le 1 ] || die "--spot and --reserved exclude each other"
  [ ${#command[@]} -gt 0 ] || die "the command to run is missing; write it after --, such as -- xomni train --distributed --config=configs/tiny/sft.py --config.run_dir=/bucket/runs/tiny"
  [ "${command[*]:0:2}" != "xomni train" ] || [[ " ${command[*]} " == *" --distributed "* ]] || die "the command runs on every host of the slice: add --distributed to xomni train"
  for secret in "${secrets[@]}"; do
    [[ $secret =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || die "--secret takes the name of an environment variable, not its value"
    [ -n "${!secret:-}" ] || die "--secret $secret: this shell has no such variable; export it first"
  done
  git diff --quiet HEAD -- || die "there are changes that are not committed; commit them: a commit is what is shipped, and what a run can be traced to"
  commit=$(git rev-parse --short=12 HEAD)
fi
where=(--zone="$zone")
[ -z "$project" ] || where+=(--project="$project")
home=gs://$bucket/launch/$name  # one folder per start in it
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# ---- gcloud ----
cloud() {
  if [ -n "$dry" ]; then printf 'gcloud'; printf ' %q' "$@"; echo; else gcloud "$@" < /dev/null; fi
}

peek() { [ -z "$dry" ] && gcloud storage "$@" 2> /dev/null < /dev/null; }  # reads the bucket; prints nothing in a dry run

reason() { grep -v '^ *$' "$work/${1:-error}" | tail -n 1 | cut -c1-500; }  # what gcloud said last

look() {  # sets state, and created, the time of creation, which distinguishes slices of the same name
  local line try
  [ -z "$dry" ] || { cloud compute tpus queued-resources describe "$name" "${where[@]}" "--format=value(state.state,createTime)"; state=ACTIVE created=DATE; return; }
  for try in 1 2 3 4 5; do
    if line=$(cloud compute tpus queued-resources describe "$name" "${where[@]}" "--format=value(state.state,createTime)" 2> "$work/look"); then
      read -r state created <<< "$line"
      created=${created//[^0-9]/}
      return
    fi
    if grep -qiE 'NOT_FOUND|not found' "$work/look"; then state=ABSENT created=""; return; fi
    say "cannot ask for the state of $name (try $try of 5): $(reason look)"
    sleep "$poll"
  done
  die "the state of $name cannot be read: $(reason look)"
}

everywhere() {  # SCRIPT: runs it on every host of every slice; returns 1 if the connection fails five times
  local try
  for try in 1 2 3 4 5; do
    if cloud compute tpus queued-resources ssh "$name" "${where[@]}" --node=all --worker=all --batch-size=all \
      --quiet "--ssh-flag=-o ServerAliveInterval=30" "--command=$1" > "$work/output" 2> "$work/error"; then
      [ -z "$dry" ] || cat "$work/output"
      return 0
    fi
    say "ssh failed (try $try of 5): $(reason)"
    look
    [ "$state" = ACTIVE ] || return 1
    sleep "$poll"
  done
  return 1
}

# ---- the steps of a run ----
ask() {
  local node=(--node-id="$name") try
  [ "$slices" = 1 ] || node=(--node-count="$slices" --node-prefix="$name")
  say "asking for $slices x $accelerator${tier[0]:+ (${tier[0]#--})}"
  for try in 1 2 3 4 5; do
    cloud compute tpus queued-resources create "$name" "${where[@]}" --accelerator-type="$accelerator" --runtime-version="$image" \
      "${node[@]}" "${tier[@]}" 2> "$work/error" && return
    ! grep -qiE 'ALREADY_EXISTS|already exists' "$work/error" || return 0
    # After a slice has existed, a refusal may mean that its quota is not free yet, or a network error: try again.
    [ -n "$again" ] || break
    say "the request was refused (try $try of 5): $(reason)"
    sleep "$poll"
  done
  if grep -qiE 'quota|RESOURCE_EXHAUSTED' "$work/error"; then
    die "no quota for $accelerator${tier[0]:+ with ${tier[0]}} in $zone: $(reason). Ask for quota, try another zone, or give back what holds it: gcloud compute tpus queued-resources list --zone=$zone"
  fi
  die "the request was refused: $(reason)"
}

give_back() {
  say "giving $name back"
  cloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet 2> "$work/error" || grep -qiE 'NOT_FOUND|not found' "$work/error" \
    || die "$name could not be deleted: $(reason). It may still cost money: look at gcloud compute tpus queued-resources list --zone=$zone"
}

obtain() {  # returns when the slice is ACTIVE, whatever its state is now
  local before="" began=$SECONDS
  while :; do
    look
    [ "$state" = "$before" ] || say "$name is $state after $(((SECONDS - began) / 60)) min"
    case $state:$before in
      ACTIVE:*) again=1; return ;;
      ABSENT:|ABSENT:ABSENT|ABSENT:SUSPENDED|ABSENT:FAILED) ask ;;
      ABSENT:*) die "$name was deleted while waiting for it" ;;
      SUSPENDED:*|FAILED:) give_back ;;  # it never becomes active again, and holds quota
      FAILED:*) die "the request for $name failed; the reason: gcloud compute tpus queued-resources describe $name ${where[*]}" ;;
    esac
    before=$state
    sleep "$poll"
  done
}

ship() {
  local archive=gs://$bucket/code/$commit.tar.gz
  ! peek ls "$archive" > /dev/null || return 0
  git archive --format=tar.gz -o "$work/code.tar.gz" HEAD
  cloud storage cp "$work/code.tar.gz" "$archive" > "$work/output" 2> "$work/error" || die "cannot write to gs://$bucket: $(reason); is that bucket yours?"
  [ -z "$dry" ] || cat "$work/output"
}

start() {  # FOLDER; returns 1 if the slice cannot be reached
  local code="\$HOME/xomni/$commit" secret words
  say "installing commit $commit on every host"
  everywhere "set -e; if [ ! -f $code/complete ]; then mkdir -p $code; gcloud storage cp gs://$bucket/code/$commit.tar.gz - | tar -xz -C $code; touch $code/complete; fi; bash $code/launch/on_host.sh install $bucket" || return 1
  if [ ${#secrets[@]} -gt 0 ]; then
    (umask 077; for secret in "${secrets[@]}"; do printf '%s=%q\n' "$secret" "${!secret}"; done > "$work/secrets")
    cloud compute tpus queued-resources scp "$work/secrets" "$name:.xomni_secrets" "${where[@]}" --node=all --worker=all --batch-size=all --quiet 2> "$work/error" \
      || { say "scp failed: $(reason)"; return 1; }
    rm -f "$work/secrets"
  fi
  say "starting on every host: ${command[*]}"
  printf -v words ' %q' "${command[@]}"
  everywhere "bash $code/launch/on_host.sh start launch/$name/$1 $accelerator $slices --$words" || return 1
  [ -n "$dry" ] || echo "$commit ${command[*]}" | gcloud storage cp - "$home/$1/command" 2> "$work/error" || die "cannot write to $home: $(reason)"
}

hosts() {  # FOLDER: sets started and ended (numbers of hosts), codes (exit codes) and shown (whose log to show: the first that failed)
  peek ls "$home/$1/" > "$work/list" || : > "$work/list"
  started=$(grep -c '\.started$' "$work/list" || true)
  ended=$(grep -c '\.exit-[0-9]*$' "$work/list" || true)
  codes=$(sed -n 's/.*\.exit-\([0-9]*\)$/\1/p' "$work/list" | sort -un | tr '\n' ' ')
  shown=$({ sed -n 's|.*/\(.*\)\.exit-[1-9][0-9]*$|\1|p' "$work/list"; sed -n 's|.*/\(.*\)\.started$|\1|p' "$work/list" | sort; } | head -1)
}

failed() { echo "${codes#0 }" | sed 's/ *$//;s/ /, /g'; }  # the exit codes other than 0

tail_of() {  # FOLDER LINES: the end of the log of the shown host
  peek cat --range=-20000 "$home/$1/$shown.log" | tr '\r' '\n' | grep -v '^ *$' | tail -n "$2" || true
}

follow() {  # FOLDER: returns 0 if the command finished, 1 if it failed (see codes), 3 if the slice was taken away
  local line last="" patience=6
  while :; do
    hosts "$1"
    line=$(tail_of "$1" 1)
    [ "$line" = "$last" ] || say "$shown: $line"
    last=$line
    [ "$ended" != "$started" ] || [ "$codes" != "0 " ] || return 0
    look
    [ "$state" = ACTIVE ] || return 3
    # When a host dies, the others fail before the state of the slice shows it: give the state time to change.
    [ -z "${codes//[0 ]/}" ] || [ $((patience -= 1)) -gt 0 ] || return 1
    sleep "$poll"
  done
}

newest() {  # [CREATED]: the newest start (on the slice created then)
  peek ls "$home/" | sed -n "s|.*/\(${1:-[0-9]*}-[0-9]*\)/\$|\1|p" | sort | tail -1 || true
}

attachable() {  # FOLDER: whether the same command is running there, or has finished there
  local what
  what=$(peek cat "$home/$1/command") || return 1
  hosts "$1"
  [ "$what" != "$commit ${command[*]}" ] || { [ -z "${codes//[0 ]/}" ]; return; }
  [ "$ended" != 0 ] || die "$name is busy with another command (commit $what); wait for it, or take another name"
  return 1
}

run() {
  local folder number outcome rid="bash launch/queued_resource.sh delete $name --zone $zone" again=""
  if [ -n "$dry" ]; then ask; look; ship; start DATE-01; give_back; return; fi
  ship
  while :; do
    obtain
    folder=$(newest "$created")
    if [ -n "$folder" ] && attachable "$folder"; then
      say "attached to start $folder, commit $commit"
    else
      number=${folder##*-}
      printf -v folder '%s-%02d' "$created" $((10#${number:-0} + 1))
      if ! start "$folder"; then
        look
        [ "$state" != ACTIVE ] || die "the hosts of $name could not be prepared: $(reason). To look: gcloud compute tpus queued-resources ssh $name ${where[*]}; the slice costs money until: $rid"
        continue
      fi
    fi
    outcome=0
    follow "$folder" || outcome=$?
    case $outcome:" $codes" in
      0:*)
        [ -n "$keep" ] || give_back
        echo "finished: logs in $home/$folder, the run where the command put it (/bucket/... is gs://$bucket/...)"
        return ;;
      3:*) say "the slice was taken away ($state); asking anew, the command resumes from its newest checkpoint" ;;
      *" 2 "*)
        tail_of "$folder" 15
        die "the command cannot run like this (exit code 2, log above); the slice is kept, it costs money until: $rid" ;;
      1:" 75 "|1:" 0 75 ") say "the command was stopped and has saved; starting it again" ;;
      *)
        tail_of "$folder" 15
        if [ "$retries" = 0 ]; then
          echo "queued_resource.sh: the command failed (exit code $(failed), log above and in $home/$folder); the slice is kept, it costs money until: $rid" >&2
          exit 1
        fi
        retries=$((retries - 1))
        say "the command failed (exit code $(failed)) on a healthy slice; starting it again, $retries more after that" ;;
    esac
  done
}

case $verb in
  run) run ;;
  status)
    look
    folder=$(newest)
    hosts "${folder:-none}"
    echo "$name is $state; newest start ${folder:-none}: $started hosts started, $ended ended${codes:+ with exit code ${codes% }}"
    [ -z "$shown" ] || tail_of "$folder" 1 ;;
  logs)
    folder=$(newest)
    [ -n "$folder$dry" ] || die "no logs under $home; was $name started with this bucket?"
    [ -n "$dry" ] || mkdir -p "logs/$name"
    cloud storage rsync --recursive "$home" "logs/$name" 2> "$work/error" || die "the logs could not be copied: $(reason)"
    hosts "$folder"
    tail_of "$folder" 40
    echo "logs: logs/$name" ;;
  delete) give_back; echo "deleted: $name" ;;
esac

# shellcheck shell=bash
# Sourced by demo.sh and long_run.sh: starts the reward services on free ports and ends them with the script. A training that was told to stop
# ends the script, too, which then says how to go on.
# usage: start_services OUT      sets url_ocr and url_shapes, and second=(--second URL) if tesseract is installed
# shellcheck disable=SC2034  # the scripts that source this file use them
services=() url_ocr="" url_shapes="" url_tesseract="" second=()
export XOMNI_STOPPED_CODE=75  # exit code of a training that was stopped and has saved
again="bash launch/$(basename "$0")${1:+ $(printf %q "$1")}"
ended() {  # CODE
  kill "${services[@]}" 2>/dev/null || true
  case $1 in 75|130|143) echo "stopped; the same command goes on from here: $again" >&2 ;; esac
}
trap 'ended $?' EXIT

start() {  # OUT NAME [options]: returns when the service answers, with its address in url_NAME; of FILE.py:CLASS, in url_CLASS
  local name=${2##*:} url=""
  local log="$1/service_$name.log"
  shift
  xomni serve-reward "$@" --port 0 > "$log" 2>&1 &
  services+=($!)
  while [ -z "$url" ]; do
    kill -0 "${services[-1]}" 2>/dev/null || { unset 'services[-1]'; cat "$log" >&2; return 1; }
    sleep 0.2
    url=$(sed -n 's/.*ready on \(http:[^;]*\);.*/\1/p' "$log")
  done
  echo "$name: $url (log: $log)"
  printf -v "url_$name" %s "$url"
}

start_services() {
  start "$1" ocr --workers 2
  start "$1" shapes --workers 1
  # The second reader is only for the report: an independent check of the texts that the policy was rewarded for.
  second=()
  if bash launch/tesseract_data.sh && start "$1" tesseract --workers 1; then
    second=(--second "$url_tesseract")
  else
    echo "no second reader: the report leaves second_reader_accuracy empty"
  fi
}

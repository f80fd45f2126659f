#!/usr/bin/env bash
# English data of tesseract, the second reader. Installed through apt where that is possible; says so where it is not.
set -euo pipefail
for data in /usr/share/tesseract-ocr/*/tessdata/eng.traineddata "${TESSDATA_PREFIX:-/none}/eng.traineddata"; do
  [ ! -f "$data" ] || exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  echo "installing tesseract-ocr-eng"
  { apt-get install -y -qq tesseract-ocr-eng || { apt-get update -qq && apt-get install -y -qq tesseract-ocr-eng; }; } > /dev/null 2>&1 && exit 0
fi
echo "tesseract's English data is missing: install the package tesseract-ocr-eng, or set TESSDATA_PREFIX" >&2
exit 1

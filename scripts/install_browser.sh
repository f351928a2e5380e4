#!/usr/bin/env bash
# Install the browser that opens the page of `cskv report` in a test. Without one that test is skipped, so this never fails.
set -uo pipefail

for name in chromium chromium-browser google-chrome; do
  if command -v "$name" >/dev/null; then
    echo "browser: $(command -v "$name")"
    exit 0
  fi
done
if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
  echo "no browser, and none can be installed without apt-get and root: the test that opens a page is skipped"
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
if apt-get update -qq >/dev/null 2>&1 && apt-get install -y -qq --no-install-recommends chromium >/dev/null 2>&1; then
  echo "browser: $(command -v chromium)"
else
  echo "no browser: apt-get could not install chromium; the test that opens a page is skipped"
fi
exit 0

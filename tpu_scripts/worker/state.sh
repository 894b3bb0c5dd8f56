#!/usr/bin/env bash
# On a host: one line, `worker 0 run: running`, or finished, stopped (resumable), failed (why) or none (never started).
# shellcheck source=tpu_scripts/worker/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

case $(systemctl is-active azr || :) in
  active | activating | deactivating | reloading) word=running ;;
  *) word=$(cat -- "$STATE" 2>/dev/null || echo none) ;;
esac
echo "worker $(worker_number) run: $word"

#!/usr/bin/env bash
# On a host: the last lines of the run's log; with --follow also what comes.
# shellcheck source=tpu_scripts/worker/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

[[ -e $LOG ]] || { echo "worker $(worker_number): no log yet, $RUN_NAME was never launched here"; exit 0; }
echo "--- worker $(worker_number): $LOG"
exec tail -n 50 "$@" -- "$LOG"

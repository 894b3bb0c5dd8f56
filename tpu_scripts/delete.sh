#!/usr/bin/env bash
# delete.sh [--now] [--dry-run]: stops the run (it saves and uploads), then deletes the slice, which ends its costs.
# --now does not wait for the run: what was not uploaded is lost. The bucket stays as it is.
# shellcheck source=tpu_scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

case "${ARGUMENTS[*]}" in
  '') remote all "$STOP_RUN" ||
    { say "could not stop the run; delete.sh --now deletes the slice all the same"; exit 1; } ;;
  --now) ;;
  *) die "unknown argument ${ARGUMENTS[*]}, see --help" ;;
esac
run gcloud compute tpus queued-resources delete "$TPU_NAME" "${WHERE[@]}" --force --quiet

#!/usr/bin/env bash
# sync.sh up|down|checkpoints [--dry-run]: up: upload the run folder from the slice to the bucket now (it happens every
# SYNC_SECONDS anyway). down: fetch it from the bucket to runs/ here, without checkpoints. checkpoints: with them.
# shellcheck source=tpu_scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

[[ -n $BUCKET ]] || die "BUCKET in $SETTINGS is empty: there is nowhere to sync to"
case "${ARGUMENTS[*]}" in
  up) remote 0 'bash azr_jax/tpu_scripts/worker/sync.sh' ;;
  down | checkpoints)
    run mkdir -p "runs/$RUN_NAME"
    exclude=(--exclude='^checkpoints/.*')
    [[ ${ARGUMENTS[0]} == down ]] || exclude=()
    run gcloud storage rsync --recursive "${exclude[@]}" "$BUCKET/$RUN_NAME" "runs/$RUN_NAME"
    ;;
  *) die "say up, down or checkpoints, see --help" ;;
esac

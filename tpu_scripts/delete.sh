#!/usr/bin/env bash
# delete.sh [--now] [--dry-run]: stops the run (it saves), uploads it, then deletes the slice, which ends its costs. It
# deletes nothing when one of these fails. --now does neither: what was not uploaded is lost. The bucket stays as it is.
# shellcheck source=tpu_scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

case "${ARGUMENTS[*]}" in
  '')
    [[ -n $BUCKET ]] || die "BUCKET in $SETTINGS is empty, so only the slice has the run: copy it, then delete.sh --now"
    { remote all "$STOP_RUN" && remote 0 "$UPLOAD_RUN"; } ||
      { say "could not stop or upload the run; delete.sh --now deletes the slice all the same"; exit 1; }
    ;;
  --now) ;;
  *) die "unknown argument ${ARGUMENTS[*]}, see --help" ;;
esac
run gcloud compute tpus queued-resources delete "$TPU_NAME" "${WHERE[@]}" --force --quiet

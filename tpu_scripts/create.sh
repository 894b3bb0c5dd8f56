#!/usr/bin/env bash
# create.sh [--dry-run]: asks for the slice. The request waits in Google's queue until there is capacity; see status.sh.
# shellcheck source=tpu_scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

request=(gcloud compute tpus queued-resources create "$TPU_NAME" "${WHERE[@]}" --node-id="$TPU_NAME"
  --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION")
case $CAPACITY in
  spot) request+=(--spot) ;;
  reserved) request+=(--reserved) ;;
  on-demand) ;;
  *) die "CAPACITY in $SETTINGS is $CAPACITY, must be spot, on-demand or reserved" ;;
esac
[[ -z $VALID_UNTIL ]] || request+=(--valid-until-duration="$VALID_UNTIL")

if [[ $DRY_RUN == yes ]]; then shown "${request[@]}"; exit 0; fi
errors=$(mktemp)
trap 'rm -f -- "$errors"' EXIT
code=0
{ "${request[@]}" 2>&1 >&3 | tee -- "$errors" >&2; } 3>&1 || code=$?
((code == 0)) || case $(<"$errors") in
  *[Qq]uota*) say "no quota for $ACCELERATOR_TYPE ($CAPACITY) in $ZONE: compare with the grant's zones and kinds, and" \
    "delete old requests, which count as well: gcloud compute tpus queued-resources list ${WHERE[*]}" ;;
  *ALREADY_EXISTS* | *"already exists"*) say "a request named $TPU_NAME exists: see status.sh and delete.sh" ;;
  *PERMISSION_DENIED*) say "is the Cloud TPU API enabled in $PROJECT, and may this account use it (roles/tpu.admin)?" ;;
esac
exit "$code"

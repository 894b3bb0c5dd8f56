# shellcheck shell=bash disable=SC2034 # the scripts that source this use what it sets
# What every script on your machine shares: settings, --dry-run, --help, and questions about the slice. Sourced.
set -euo pipefail

DRY_RUN=no ARGUMENTS=()
for argument in "$@"; do
  case $argument in
    --dry-run) DRY_RUN=yes ;;
    -h | --help) sed -n '2,/^# shellcheck/{/^# shellcheck/!s/^# //p}' "$0"; exit 0 ;;
    *) ARGUMENTS+=("$argument") ;;
  esac
done

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 2; }
[[ -z ${ARGUMENTS[*]} || ${0##*/} =~ ^(delete|logs|sync)\.sh$ ]] || die "unknown argument ${ARGUMENTS[*]}, see --help"

SETTINGS=tpu_scripts/settings.sh
[[ -z ${TPU_SETTINGS:-} ]] || { SETTINGS=$(realpath -- "$TPU_SETTINGS") && export TPU_SETTINGS=$SETTINGS; }
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
[[ -r $SETTINGS ]] || die "cannot read the settings $SETTINGS"
# shellcheck source=tpu_scripts/settings.sh
source "$SETTINGS"
for name in PROJECT ZONE TPU_NAME ACCELERATOR_TYPE RUNTIME_VERSION CAPACITY PYTHON_VERSION RUN_NAME CONFIG RUNS_DIR \
  SYNC_SECONDS POLL_SECONDS DELETE_WHEN_DONE; do [[ -n ${!name:-} ]] || die "$name is missing in $SETTINGS"; done
for name in VALID_UNTIL MODEL BUCKET; do [[ -v $name ]] || die "$name is missing in $SETTINGS"; done
[[ -z $BUCKET || $BUCKET == gs://?* ]] || die "BUCKET in $SETTINGS is $BUCKET, must be empty or begin with gs://"
[[ -n $BUCKET || ! "${0##*/} $ACCELERATOR_TYPE" =~ ^(create|launch|watch).*-[0-9]{2,}$ ]] ||
  die "$ACCELERATOR_TYPE has several hosts, which share the run in a bucket, and BUCKET in $SETTINGS is empty"
[[ -n $BUCKET || $DELETE_WHEN_DONE != yes ]] || die "DELETE_WHEN_DONE=yes without a BUCKET would delete the run as well"
[[ $RUN_NAME != */* ]] || die "RUN_NAME in $SETTINGS is $RUN_NAME, must be a name without /"
[[ $DRY_RUN == yes || $PROJECT != my-project ]] || die "PROJECT in $SETTINGS is still the placeholder my-project"
[[ $DRY_RUN == yes || $BUCKET != gs://my-bucket/azr ]] || die "BUCKET in $SETTINGS is still the placeholder $BUCKET"
[[ $DRY_RUN == yes ]] || command -v gcloud >/dev/null || die 'gcloud is missing, see docs/tpu.md'
WHERE=(--project="$PROJECT" --zone="$ZONE")

shown() { # a command as bash reads it back
  local word line=
  for word; do
    [[ ! $word =~ ^(--[a-z-]+=)?(.*[^A-Za-z0-9_./:=@,+-].*)?$ ]] || word=${BASH_REMATCH[1]}${BASH_REMATCH[2]@Q}
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

run() { if [[ $DRY_RUN == yes ]]; then shown "$@"; else "$@"; fi; }

# gcloud runs the command once more when the connection breaks in the middle: it must bear that.
remote() { run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${WHERE[@]}" --worker="$1" --command="$2"; }

ask() { # the answer of a describe command; ABSENT if there is no such thing, UNKNOWN if gcloud could not tell
  local answer errors; errors=$(mktemp)
  if answer=$(gcloud "$@" 2>"$errors"); then printf '%s\n' "${answer:-UNKNOWN}"
  elif grep -qi 'NOT_FOUND\|was not found' "$errors"; then echo ABSENT
  else cat "$errors" >&2; echo UNKNOWN; fi; rm -f -- "$errors"
}

QUEUE=(compute tpus queued-resources describe "$TPU_NAME" "${WHERE[@]}" --format='value(state.state)')
NODE=(compute tpus tpu-vm describe "$TPU_NAME" "${WHERE[@]}" --format='value(state)')
# A run that still saves is `deactivating`, for which `is-active` fails as it does for none; to stop it is to wait.
NO_RUN='systemctl is-active azr | grep -qxE "inactive|failed|unknown"'
STOP_RUN="$NO_RUN || sudo systemctl stop azr"
# A host that was never set up has nothing to upload, and no state.sh.
UPLOAD_RUN='[ ! -d azr_jax ] || bash azr_jax/tpu_scripts/worker/sync.sh'
RUN_STATE='bash azr_jax/tpu_scripts/worker/state.sh 2>/dev/null || echo "run: none"'

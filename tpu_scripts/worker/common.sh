# shellcheck shell=bash
# What the scripts on the slice's hosts share: settings, places, upload and restore. Sourced.
set -euo pipefail
shopt -s nullglob
# shellcheck source=tpu_scripts/settings.sh
source "$HOME/azr_settings.sh"
export PATH="$HOME/.local/bin:$PATH" # where uv installs itself

# shellcheck disable=SC2034
{
  TREE=$HOME/azr_jax VENV=$HOME/azr_venv LOCAL_MODEL=$HOME/azr_model
  RUN=$(cd && realpath -m -- "$RUNS_DIR")/$RUN_NAME
  LOG=$RUN.log STATE=$RUN.state # beside the run folder, which is the run's own
  REMOTE=${BUCKET%/}/$RUN_NAME
}

attribute() { # of this machine, as JAX asks for it too
  curl -fsS -m 5 -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1" 2>/dev/null
}

worker_number() { attribute agent-worker-number || echo 0; } # 0 where there is no metadata server

several_hosts() { [[ $(attribute worker-network-endpoints || :) == *,* ]]; }

# The checkpoints are listed before the logs go up, and go up after them: a checkpoint in the bucket never lacks rows of
# metrics, and rows beyond it are cut on resume. The newest goes first. One that the run prunes meanwhile may be torn
# (train renames it before it empties it, so it was whole if it is still there). What did not arrive whole, old or torn,
# is removed last, and only when the newest did.
upload() {
  [[ -n $BUCKET && -d $RUN && $(worker_number) == 0 ]] || return 0
  local folder old kept=() arrived=' '
  for folder in "$RUN"/checkpoints/step_[0-9][0-9][0-9][0-9][0-9][0-9]; do # the names of half-written ones go on
    kept=("$folder" "${kept[@]}")
  done
  gcloud storage rsync --recursive --exclude='^(checkpoints/.*|\.lock)$' "$RUN" "$REMOTE" || return
  ((${#kept[@]})) || return 0
  for folder in "${kept[@]}"; do
    if gcloud storage rsync --recursive "$folder" "$REMOTE/checkpoints/${folder##*/}" && [[ -d $folder ]]; then
      arrived+="${folder##*/} "
    elif [[ -d $folder || $arrived == ' ' ]]; then
      [[ -d $folder ]] || echo "${folder##*/} was pruned on its way up: raise checkpoint.keep or checkpoint.every"
      return 1
    fi
  done
  while read -r old; do
    old=${old%/}
    [[ $arrived == *" ${old##*/} "* ]] || gcloud storage rm --recursive "$old" || return
  done < <(gcloud storage ls "$REMOTE/checkpoints/")
}

# Only "there is nothing" counts as nothing: any other trouble must not start a second run over the first one's copy.
restore() {
  [[ -n $BUCKET && ! -e $RUN ]] || return 0
  local answer
  if answer=$(gcloud storage ls "$REMOTE/config.yaml" 2>&1); then
    mkdir -p "$RUN.part"
    gcloud storage rsync --recursive "$REMOTE" "$RUN.part" && mv -- "$RUN.part" "$RUN"
  elif [[ $answer == *"matched no objects"* ]]; then
    echo "nothing at $REMOTE: a new run"
  else
    printf '%s\n' "$answer"
    return 1
  fi
}

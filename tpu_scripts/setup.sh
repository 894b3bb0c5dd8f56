#!/usr/bin/env bash
# setup.sh [--dry-run]: copies this working tree and the settings to every host, installs Python and azr_jax there.
# May be repeated; refuses while a run is live, whose code it would replace.
# shellcheck source=tpu_scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

tree=build/azr_jax.tar.gz
run mkdir -p build
run tar --exclude-vcs --exclude=./build --exclude=./runs --exclude=./.venv --exclude='*.egg-info' --exclude='.*_cache' \
  --exclude=__pycache__ --exclude=.hypothesis -czf "$tree" .
run gcloud compute tpus tpu-vm scp "$tree" "$TPU_NAME:azr_jax.tar.gz" "${WHERE[@]}" --worker=all
run gcloud compute tpus tpu-vm scp "$SETTINGS" "$TPU_NAME:azr_settings.sh" "${WHERE[@]}" --worker=all
guard="$NO_RUN || { echo \"a run is live: stop.sh first\" >&2; exit 1; }"
unpack='rm -rf azr_jax && mkdir azr_jax && tar -xzf azr_jax.tar.gz -C azr_jax'
remote all "$guard; $unpack && bash azr_jax/tpu_scripts/worker/install.sh"

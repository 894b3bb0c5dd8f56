#!/usr/bin/env bash
# launch.sh [--dry-run]: starts or resumes the run of the settings on every host, as a systemd unit that outlives ssh.
# Does nothing where it is live already.
# shellcheck source=tpu_scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

run gcloud compute tpus tpu-vm scp "$SETTINGS" "$TPU_NAME:azr_settings.sh" "${WHERE[@]}" --worker=all
remote all 'bash azr_jax/tpu_scripts/worker/start.sh'

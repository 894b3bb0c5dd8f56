#!/usr/bin/env bash
# logs.sh [WORKER|all] [--follow] [--dry-run]: the last lines of the run's log on one host (0 unless named) or on all.
# shellcheck source=tpu_scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

worker=0 follow=
for argument in "${ARGUMENTS[@]}"; do
  case $argument in
    --follow) follow=' --follow' ;;
    all) worker=all ;;
    *[!0-9]* | '') die "unknown argument $argument, see --help" ;;
    *) worker=$argument ;;
  esac
done
remote "$worker" "bash azr_jax/tpu_scripts/worker/log.sh$follow"

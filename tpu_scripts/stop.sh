#!/usr/bin/env bash
# stop.sh [--dry-run]: has the run give up its step, save a checkpoint and upload. launch.sh goes on from there.
# shellcheck source=tpu_scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

remote all "$STOP_RUN"

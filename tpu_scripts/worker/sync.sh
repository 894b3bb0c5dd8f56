#!/usr/bin/env bash
# On a host: uploads the run folder to the bucket once.
# shellcheck source=tpu_scripts/worker/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

upload

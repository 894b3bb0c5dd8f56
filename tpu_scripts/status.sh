#!/usr/bin/env bash
# status.sh [--dry-run]: the queued resource's state, the node's, and whether the run is alive on each host.
# shellcheck source=tpu_scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

if [[ $DRY_RUN == yes ]]; then
  shown gcloud "${QUEUE[@]}"
  shown gcloud "${NODE[@]}"
  remote all "$RUN_STATE"
  exit 0
fi
queue=$(ask "${QUEUE[@]}")
echo "queued resource $TPU_NAME: $queue"
if [[ $queue == FAILED ]]; then
  ask "${QUEUE[@]:0:${#QUEUE[@]}-1}" --format='value(state.failedData.error.message)'
fi
[[ $queue == ACTIVE ]] || exit 0
node=$(ask "${NODE[@]}")
echo "node: $node"
[[ $node == READY ]] || exit 0
remote all "$RUN_STATE"

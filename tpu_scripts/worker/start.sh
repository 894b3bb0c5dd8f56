#!/usr/bin/env bash
# On a host: starts run.sh as the systemd unit azr, unless it is live. A system unit, because a user's own manager ends
# with the last ssh session, and because at a preemption systemd sends it SIGTERM in time, before the network goes
# (After=). KillMode=mixed: only run.sh gets that signal, and ends the rest in order. The limits are those that the
# image gives to logins, and systemd does not to units: the TPU's driver locks memory.
# shellcheck source=tpu_scripts/worker/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

case $(systemctl is-active azr || :) in
  active | activating | reloading) echo "worker $(worker_number): live already"; exit 0 ;;
  deactivating) echo "worker $(worker_number): the last run is still stopping, try again" >&2; exit 1 ;;
esac
rm -f -- "$STATE"
sudo systemd-run --unit=azr --collect --uid="$(id -un)" --setenv="PATH=$PATH" --working-directory="$TREE" \
  --property=KillMode=mixed --property=TimeoutStopSec=600 --property="After=network.target network-online.target" \
  --property=LimitMEMLOCK=infinity --property=LimitNOFILE=100000 bash "$TREE/tpu_scripts/worker/run.sh"
echo "worker $(worker_number): started"

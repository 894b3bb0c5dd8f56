#!/usr/bin/env bash
# watch.sh [--dry-run]: keeps the run going until it is finished: asks for the slice, sets it up, launches, and after a
# preemption does it all again. Run it in tmux on a machine that stays on. Ends with 0 when the run is finished, with 1
# when it failed or when the slice could not be had, set up or asked. Then it says whether there is one that costs.
# shellcheck source=tpu_scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

here=tpu_scripts # common.sh went to the repository's root
if [[ $DRY_RUN == yes ]]; then
  echo "# every $POLL_SECONDS s: how is it?"
  "$here/status.sh" --dry-run
  echo '# no slice:'
  "$here/create.sh" --dry-run
  echo '# a preempted slice:'
  "$here/delete.sh" --now --dry-run
  echo '# a slice without a live run:'
  for script in stop setup launch; do "$here/$script.sh" --dry-run; done
  exit 0
fi

note() { say "$(date '+%F %T') $*"; }

leave() { # CODE WORDS
  [[ $state != 'node READY' ]] || set -- "$1" "$2; the slice still costs until delete.sh"
  note "$2"; exit "$1"
}

failures=0
failed() { # capacity comes and goes and hosts take their time to boot, so a few times in a row
  ((++failures < 5)) || leave 1 "$1 failed, and so did the four tries before: giving up"
}
try() {
  local script
  for script; do "$here/$script.sh" || { failed "$script.sh"; return; }; done
  failures=0
}

while :; do
  state=$(ask "${QUEUE[@]}")
  [[ $state != ACTIVE ]] || state="node $(ask "${NODE[@]}")"
  case $state in
    ABSENT) try create ;;
    SUSPENDED | FAILED | 'node PREEMPTED' | 'node TERMINATED' | 'node ABSENT')
      note "$state: the slice is gone, clearing the way for a new one"
      "$here/delete.sh" --now || failed 'delete.sh'
      ;;
    'node READY')
      runs=$(remote all "$RUN_STATE") || runs='run: cannot be asked'
      note "${runs//$'\n'/, }"
      case $runs in
        *'run: failed'*) "$here/logs.sh" all || :; leave 1 'the run failed' ;;
        *'run: none'* | *'run: stopped'*) try stop setup launch ;;
        *'run: running'*) failures=0 ;;
        *'run: finished'*)
          [[ $DELETE_WHEN_DONE == yes ]] || leave 0 finished
          "$here/delete.sh" --now || leave 1 'finished, but delete.sh failed'
          exit 0
          ;;
        *) failed 'asking the hosts' ;;
      esac
      ;;
    *) note "$state: waiting" ;;
  esac
  sleep "$POLL_SECONDS"
done

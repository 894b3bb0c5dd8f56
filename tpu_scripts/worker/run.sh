#!/usr/bin/env bash
# On a host, as the unit azr: fetch the run folder if it is only in the bucket, train, upload now and then and at the
# end, and leave one word on how it went. SIGTERM: train saves and ends, the rest follows.
# shellcheck source=tpu_scripts/worker/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
set -m # a job is a process group: stopping the uploads stops their gcloud too

mkdir -p "${RUN%/*}"
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/azr_compiled} # a resume compiles nothing again
exec >>"$LOG" 2>&1 </dev/null
begin=$(wc -c <"$LOG") # what is before it tells of earlier launches
end() { printf '%s\n' "$*" >"$STATE"; exit "${code:-0}"; }

code=1 place=$RUN
if several_hosts; then # one run over all of them: its folder is where all can reach it, and train does the rest
  [[ -n $BUCKET ]] || end 'failed (a slice of several hosts needs a BUCKET)'
  place=$REMOTE
else
  restore || end "failed (could not read $REMOTE)"
fi
if [[ -n $MODEL && $MODEL != "$(cat -- "$LOCAL_MODEL.from" || :)" ]]; then
  end "failed (MODEL is $MODEL, and what setup.sh fetched is not: setup.sh again)"
fi
[[ -z $MODEL ]] || OVERRIDES=("model=$LOCAL_MODEL" "${OVERRIDES[@]}")
grace=300 # for an update, of the unit's 600 s; a spot slice vanishes so soon that what there is should rather go up
[[ $CAPACITY != spot ]] || grace=20
stopped=no
trap 'stopped=yes; kill -TERM $(jobs -p) || :' TERM # the one job is train, if it is there yet
"$VENV/bin/azr-jax" train "$CONFIG" "run_dir=$place" "${OVERRIDES[@]}" --grace "$grace" &
trainer=$!
# A second try at once: where the run pruned the newest checkpoint under the first one, there is a fresh one now.
while sleep "$SYNC_SECONDS"; do upload || upload || echo "upload failed, the next one is in $SYNC_SECONDS s"; done &
uploads=$!
disown "$uploads" # its end is no news for the log
[[ $stopped == no ]] || kill -TERM "$trainer" || :

while kill -0 "$trainer" 2>/dev/null; do wait "$trainer" || :; done # a signal ends `wait` early, not the job
code=0
wait "$trainer" || code=$?
[[ $stopped$code != yes143 ]] || code=0 # stopped before train could catch it: nothing was done, so nothing is lost
kill -- "-$uploads" 2>/dev/null || :
for _ in 1 2 3; do if upload; then uploaded=yes; break; fi; sleep 10; done
((code != 75)) || { code=1; end 'stopped (another host is gone)'; }
((code == 0)) || end "failed (exit code $code)"
[[ ${uploaded:-no} == yes ]] || { code=1; end "failed (the last upload)"; }
# train ends with 0 also when only itself or another host was told to stop, but then says that there is more to do
if grep -q '; resumable: run the same command again' < <(tail -c "+$((begin + 1))" -- "$LOG"); then stopped=yes; fi
if [[ $stopped == yes ]]; then end stopped; else end finished; fi

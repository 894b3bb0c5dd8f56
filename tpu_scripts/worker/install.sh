#!/usr/bin/env bash
# On a host: a Python that is new enough (the image's is 3.10), azr_jax in a virtual environment, the model's weights.
# shellcheck source=tpu_scripts/worker/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

mkdir -p "${RUN%/*}"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[[ -x $VENV/bin/python ]] || uv venv --python "$PYTHON_VERSION" "$VENV"
uv pip install --quiet --python "$VENV/bin/python" --editable "${TREE}[tpu]"
if [[ -n $MODEL ]]; then
  mkdir -p "$LOCAL_MODEL" # and no files of another model in it
  rm -f -- "$LOCAL_MODEL.from" # nothing whole is there until the copy has ended
  gcloud storage rsync --recursive --delete-unmatched-destination-objects "$MODEL" "$LOCAL_MODEL"
  printf "%s\n" "$MODEL" >"$LOCAL_MODEL.from"
fi
echo "worker $(worker_number): installed"

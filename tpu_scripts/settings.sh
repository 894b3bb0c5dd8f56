# shellcheck shell=bash disable=SC2034
# Everything the TPU scripts need to know. Edit this file, or keep a copy of your own and name it:
#   TPU_SETTINGS=mine.sh tpu_scripts/create.sh
# bash reads it on your machine and on the slice's hosts, where setup.sh and launch.sh copy it. So quote values with
# spaces, and put no secrets here: scripts and hosts use the accounts that gcloud is logged in with.

# --- the slice -------------------------------------------------------------------------------------------------------
PROJECT=my-project                   # Google Cloud project that holds the grant or pays
ZONE=us-west4-a                      # a zone where that project has quota for ACCELERATOR_TYPE
TPU_NAME=azr                         # name of the queued resource and of its node
ACCELERATOR_TYPE=v5litepod-8         # see the table in docs/tpu.md; one host: v5litepod-8, v6e-8, v5p-8
RUNTIME_VERSION=v2-alpha-tpuv5-lite  # VM image; v6e: v2-alpha-tpuv6e, v5p: v2-alpha-tpuv5, v4: tpu-ubuntu2204-base
CAPACITY=spot                        # spot (may vanish at any moment), on-demand or reserved
VALID_UNTIL=                         # give up waiting in the queue after this long, such as 12h; empty: wait for ever
PYTHON_VERSION=3.12                  # installed by uv: the image brings 3.10, azr_jax needs 3.11 or newer

# --- the run ---------------------------------------------------------------------------------------------------------
RUN_NAME=demo                        # of the run folder, on the host and in the bucket
CONFIG=configs/demo.yaml             # relative to the repository
OVERRIDES=()                         # more configuration keys, such as (steps=200 learn.lr=2e-6)
RUNS_DIR=azr_runs                    # run folders on the hosts: below home, or an absolute path
MODEL=                               # gs:// folder of a Hugging Face checkpoint, copied to the hosts; empty: as CONFIG

# --- what outlives the slice -----------------------------------------------------------------------------------------
BUCKET=gs://my-bucket/azr            # run folders are kept below it. One host can do with an empty one, but starts from
                                     # nothing after a preemption
SYNC_SECONDS=600                     # between two uploads of the run folder, and at most that much work is lost
POLL_SECONDS=60                      # between two looks of watch.sh
DELETE_WHEN_DONE=no                  # yes: watch.sh deletes the slice once the run is finished and uploaded

#!/usr/bin/env bash
# One node's part of a training run: train.sh [OPTION OF fastft.train]...
#
# It takes MODEL, DATA (already at ~/data), BUCKET, RUN_NAME, GLOBAL_BATCH and ARGS from the YAML's envs. Started again after a
# preemption, the trainer resumes from the newest complete checkpoint in BUCKET/RUN_NAME, on any number of GPUs; if the run is
# finished, it downloads nothing and ends with 0. Weights, tokens and checkpoints are on the local disk, and the trainer uploads
# checkpoints in the background.
set -euo pipefail
. ~/venv/bin/activate
export HF_HOME="$HOME/.cache/huggingface"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100 # torchrun's 30 s would cut off the save after a notice of preemption
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
RUN_NAME=${RUN_NAME:-$(basename "$MODEL")}
output="$HOME/runs/$RUN_NAME"
first=$(head -n 1 <<<"$SKYPILOT_NODE_IPS")

# The same global batch on all kinds of GPUs: a packed row of 2,048 tokens for each 20 GB of a GPU, or fewer, so that they divide
# the batch.
processes=$SKYPILOT_NUM_GPUS_PER_NODE
[ "$processes" -gt 0 ] || processes=1 # on a machine without GPUs, for trying it out
gpus=$((SKYPILOT_NUM_NODES * processes))
memory=$(nvidia-smi --id=0 --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null || echo 0) # MiB
rows=$((memory / 20000 > 1 ? memory / 20000 : 1))
while [ $((rows > 1 && GLOBAL_BATCH % (gpus * rows))) != 0 ]; do rows=$((rows - 1)); done

rm -f "$output/preempted" # left by an earlier start, if the machine was kept
trap : TERM INT # torchrun gets the signal, too; this script waits for it, to tell SkyPilot how it ended
code=0
# shellcheck disable=SC2086  # ARGS is a list of words
torchrun --nnodes "$SKYPILOT_NUM_NODES" --node-rank "$SKYPILOT_NODE_RANK" --nproc-per-node "$processes" \
  --master-addr "$first" --master-port 29500 -m fastft.train --model "$MODEL" --data ~/data/conversations.jsonl \
  --output_dir "$output" --checkpoint.remote "${BUCKET%/}/$RUN_NAME" \
  --global_batch_size "$GLOBAL_BATCH" --micro_batch_size "$rows" "$@" $ARGS || code=$?

# torchrun ends with 1 for every failure. Exit code 75 is in every job_recovery: it restarts the job and never counts as an error.
if [ "$code" != 0 ] && [ -f "$output/preempted" ]; then exit 75; fi
exit "$code"

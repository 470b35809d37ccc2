#!/usr/bin/env bash
# A node's part of a training run: train.sh [FLAG OF fastft.train]...
#
# From the YAML's envs: MODEL, DATA (already at ~/data), BUCKET, RUN_NAME, GLOBAL_BATCH, ARGS. Started again after an
# interruption, the trainer goes on from the newest whole checkpoint in BUCKET/RUN_NAME, on any number of GPUs; of a finished
# run it fetches nothing and ends with 0. Weights, tokens and checkpoints lie on the local disk; the trainer uploads behind itself.
set -euo pipefail
. ~/venv/bin/activate
export HF_HOME="$HOME/.cache/huggingface"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100 # torchrun's 30 s would cut off the save that follows a notice
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
RUN_NAME=${RUN_NAME:-$(basename "$MODEL")}
output="$HOME/runs/$RUN_NAME"
first=$(head -n 1 <<<"$SKYPILOT_NODE_IPS")

# The same global batch on every candidate: a packed row of 2,048 for each 20 GB of a GPU, as far as that divides.
processes=$SKYPILOT_NUM_GPUS_PER_NODE
[ "$processes" -gt 0 ] || processes=1 # a machine without GPUs is for trying out
gpus=$((SKYPILOT_NUM_NODES * processes))
memory=$(nvidia-smi --id=0 --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null || echo 0) # MiB
rows=$((memory / 20000 > 1 ? memory / 20000 : 1))
while [ $((rows > 1 && GLOBAL_BATCH % (gpus * rows))) != 0 ]; do rows=$((rows - 1)); done

rm -f "$output/preempted" # the mark of an earlier start, on a machine that was kept
trap : TERM INT # torchrun hears the signal, too; this script waits for it, to tell SkyPilot how it ended
code=0
# shellcheck disable=SC2086  # ARGS is a list of words
torchrun --nnodes "$SKYPILOT_NUM_NODES" --node-rank "$SKYPILOT_NODE_RANK" --nproc-per-node "$processes" \
  --master-addr "$first" --master-port 29500 -m fastft.train --model "$MODEL" --data ~/data/conversations.jsonl \
  --output_dir "$output" --checkpoint.remote "$BUCKET/$RUN_NAME" \
  --global_batch_size "$GLOBAL_BATCH" --micro_batch_size "$rows" "$@" $ARGS || code=$?

# torchrun ends with 1 whatever happened. 75 is in every job_recovery: it starts the job again and never counts as an error.
if [ "$code" != 0 ] && [ -f "$output/preempted" ]; then exit 75; fi
exit "$code"

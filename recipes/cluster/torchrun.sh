#!/usr/bin/env bash
# Run a recipe on several machines without a scheduler; start this script on each of them:
#
#   NODES=2 NODE_RANK=0 MASTER=first-host:29500 recipes/cluster/torchrun.sh recipes/detect_voc.yaml
#   NODES=2 NODE_RANK=1 MASTER=first-host:29500 recipes/cluster/torchrun.sh recipes/detect_voc.yaml
#
# If a rank fails, torchrun restarts all ranks, and they resume from the last checkpoint, which must be in
# a folder that every machine can read. Further arguments are passed to fit. Environment variables:
#
#   NODES       number of machines (default: 1)
#   NODE_RANK   number of this machine, from 0 (default: 0)
#   MASTER      host:port of the first machine, reachable from all (default: 127.0.0.1:29500)
#   DEVICES     processes on this machine (default: one per GPU)
#   RUN_ID      name of the training; the same name resumes it (default: name of the recipe)
#   RESTARTS    maximum number of restarts (default: 3)
#   LOCAL_ADDR  address of this machine, if the others cannot resolve its name
set -euo pipefail

recipe=${1:?recipe missing; usage: recipes/cluster/torchrun.sh RECIPE [options of fit]}
shift

# SITE: activate the environment
if [ -f .venv/bin/activate ]; then
    source .venv/bin/activate
fi

NODES=${NODES:-1}
if [ "${DEVICES:-auto}" = auto ]; then
    DEVICES=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
MASTER=${MASTER:-127.0.0.1:29500}
RUN_ID=${RUN_ID:-$(basename "$recipe" .yaml)}
# SITE: the network interface, if NCCL or Gloo choose the wrong one
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# with a store shared with the agents, restarted ranks would read the addresses of the failed ones
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / DEVICES > 0 ? $(nproc) / DEVICES : 1))}

exec torchrun --nnodes "$NODES" --nproc-per-node "$DEVICES" --node-rank "${NODE_RANK:-0}" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER" --rdzv-id "$RUN_ID" \
    --rdzv-conf "is_host=$([ "${NODE_RANK:-0}" = 0 ] && echo true || echo false)" \
    --max-restarts "${RESTARTS:-3}" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
    -m yolo_lightning fit --config "$recipe" --resume auto \
    --trainer.num_nodes "$NODES" --trainer.devices "$DEVICES" "$@"

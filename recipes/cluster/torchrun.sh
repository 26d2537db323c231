#!/usr/bin/env bash
# Any recipe over several machines without a scheduler; start it on every one of them:
#
#   NODES=2 NODE_RANK=0 MASTER=first-host:29500 recipes/cluster/torchrun.sh recipes/yolov2_voc2007.yaml
#   NODES=2 NODE_RANK=1 MASTER=first-host:29500 recipes/cluster/torchrun.sh recipes/yolov2_voc2007.yaml
#
# A rank that dies takes the others down; the agents start all of them again, and they go on from the
# last checkpoint, which has to lie where every machine can read it. More options of fit may follow.
#
#   NODES       machines; 1
#   NODE_RANK   of this machine, from 0 on; 0
#   MASTER      host and port of the first one, reachable from all
#   DEVICES     processes on this machine, one for each GPU; as many as there are GPUs
#   RUN_ID      what this training is called: started again under the same name, it goes on
#   RESTARTS    how often the agents start the ranks again; 3
#   LOCAL_ADDR  this machine's own address, where its name does not lead the others to it
set -euo pipefail

recipe=${1:?which recipe? recipes/cluster/torchrun.sh RECIPE [options of fit]}
shift

# SITE: how the environment is entered
if [ -f .venv/bin/activate ]; then
    source .venv/bin/activate
fi

NODES=${NODES:-1}
if [ "${DEVICES:-auto}" = auto ]; then
    DEVICES=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
MASTER=${MASTER:-127.0.0.1:29500}
RUN_ID=${RUN_ID:-$(basename "$recipe" .yaml)}
# SITE: the interface between the machines, where NCCL or gloo choose another one
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# ranks that are started again would find the addresses of the dead ones in a store shared with the agents
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / DEVICES > 0 ? $(nproc) / DEVICES : 1))}

exec torchrun --nnodes "$NODES" --nproc-per-node "$DEVICES" --node-rank "${NODE_RANK:-0}" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER" --rdzv-id "$RUN_ID" \
    --rdzv-conf "is_host=$([ "${NODE_RANK:-0}" = 0 ] && echo true || echo false)" \
    --max-restarts "${RESTARTS:-3}" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
    -m yolo_lightning fit --config "$recipe" --resume auto \
    --trainer.num_nodes "$NODES" --trainer.devices "$DEVICES" "$@"

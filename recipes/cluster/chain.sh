#!/usr/bin/env bash
# Train recipes one after another, each from the best checkpoint of the one before. By default: the
# classifier at 224 px, at 448 px, the detector, the joint detector.
#
#   recipes/cluster/chain.sh NAME [RECIPE …] [options of fit, for all stages]      one machine
#   DEVICES=8 recipes/cluster/chain.sh NAME                 torchrun.sh, with all of its variables
#   recipes/cluster/chain.sh --slurm NAME                   one job a stage, afterok the one before
#   recipes/cluster/chain.sh --dry-run [--slurm] NAME       check all stages, print the commands
#
# All stages are checked before the first one starts. Start the same command again at any time:
# finished stages are skipped, an interrupted one resumes, and the later ones follow. Runs are in
# FOLDER/NAME (default: outputs/chain/NAME), and have the MLflow tag chain = NAME.
set -euo pipefail

command=${FOLDER:+FOLDER=${FOLDER@Q} }
for name in DEVICES NODES NODE_RANK MASTER; do
    [ -z "${!name:-}" ] || command+="$name=${!name@Q} "
done
command+=$(printf '%q ' "$0" "$@")
launcher=fit dry_run=
[ -z "${DEVICES:-}${NODES:-}" ] || launcher=torchrun
while [[ ${1:-} == --* ]]; do
    case $1 in
        --slurm) launcher=slurm ;;
        --dry-run) dry_run=yes ;;
        *) echo "chain.sh: unknown option $1; allowed before NAME: --slurm, --dry-run" >&2; exit 2 ;;
    esac
    shift
done
name=${1:?NAME missing; usage: recipes/cluster/chain.sh [--slurm] [--dry-run] NAME [RECIPE …] [options of fit]}
shift
recipes=()
while [[ $# -gt 0 && $1 != -* ]]; do recipes+=("$1"); shift; done
scripts=$(dirname "$0")
if [ ${#recipes[@]} = 0 ]; then
    for stage in classify_imagenet_224 classify_imagenet_448 detect_coco joint_yolo9000; do
        recipes+=("$(dirname "$scripts")/$stage.yaml")
    done
fi

# SITE: activate the environment
if [ -f .venv/bin/activate ]; then
    source .venv/bin/activate
fi

# start or submit a stage: RECIPE [options of fit]
train() {
    case $launcher in
        fit) set -- python -m yolo_lightning fit --config "$1" --resume auto "${@:2}" ;;
        torchrun) set -- "$scripts/torchrun.sh" "$@" ;;
        slurm) set -- sbatch --parsable --job-name="chain-$name" --kill-on-invalid-dep=yes \
            ${job:+--dependency="afterok:$job"} "$scripts/slurm.sbatch" "$@" ;;
    esac
    [ -z "$dry_run" ] || { printf '%q ' "$@"; echo; job=JOB; return 0; }
    [ "$launcher" = slurm ] || { "$@"; return; }
    job=$("$@") && job=${job%%;*} && echo "job $job: $stage"
}

stop() {
    echo "chain $name: stopped in ${stage:-its check} with code $1; to go on: $command" >&2
    exit "$1"
}

if [ "$launcher$dry_run" = slurm ] && [ -n "$(squeue --noheader --me --name="chain-$name")" ]; then
    echo "chain $name: its jobs are still in the queue; see: squeue --me --name=chain-$name" >&2
    exit 2
fi
# one line for each stage to train: its recipe and options, quoted for the shell
plan=$(python -m yolo_lightning chain "$name" "${recipes[@]}" --folder "${FOLDER:-outputs/chain}" "$@") || exit
trap : INT # the stage stops by itself; then its exit code is ours
job='' stage=''
while read -r line <&3 && [ -n "$line" ]; do
    eval "words=($line)"
    stage=${words[0]}
    train "$stage" "$@" "${words[@]:1}" || stop $?
done 3<<< "$plan"

#!/usr/bin/env bash
# Trains on TPUs of Kubernetes (GKE) through xpk: bash launch/gke_xpk.sh [--dry-run] ACTION [flags of src.main]
#
#   create   makes the cluster CLUSTER with SLICES slices of ACCELERATOR
#   run      starts the workload RUN_NAME; its containers clone and install the code themselves; flags go to src.main
#   status   lists the workloads
#   logs     follows the log of one worker of the first slice (WORKER=0)
#   stop     deletes the workload; the cluster stays and costs
#   delete   deletes the cluster; checkpoints stay in the bucket
#
# Settings are in launch/cluster.env: PROJECT, ZONE, ACCELERATOR, SLICES, SPOT, RESERVATION, CLUSTER, IMAGE, BUCKET,
# REPOSITORY, CONFIG and others. --dry-run prints the commands and runs nothing.
# It needs xpk (pipx install xpk) with what it asks for: gcloud, kubectl, kueuectl.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

do_create() {
  local capacity=(--on-demand) extra=()
  read -r -a extra <<<"$CREATE_FLAGS"
  [[ $SPOT == false ]] || capacity=(--spot)
  [[ -z $RESERVATION ]] || capacity=("--reservation=$RESERVATION")
  execute xpk cluster create "--cluster=$CLUSTER" "${place[@]}" "--tpu-type=$ACCELERATOR" "--num-slices=$SLICES" \
    "${capacity[@]}" ${extra[@]+"${extra[@]}"}
}

do_run() {
  local restarts=$RETRIES setup train
  need CONFIG REPOSITORY BRANCH IMAGE
  need_workdir
  add_main_flags
  # Kubernetes restarts the workload, on new machines where some were taken away. Our errors exit with 1, which xpk
  # would otherwise take for final.
  RETRIES=0
  setup="$(fetch_checkout) && ( $(in_checkout setup) )"
  train="cd $RUN_NAME && exec $(in_environment run "${FLAGS[@]}")"
  execute xpk workload create "--workload=$RUN_NAME" "--cluster=$CLUSTER" "${place[@]}" "--tpu-type=$ACCELERATOR" \
    "--num-slices=$SLICES" "--docker-image=$IMAGE" "--max-restarts=$restarts" --restart-on-exit-codes=1 \
    "--command=$setup && $train"
}

do_status() {
  execute xpk workload list "--cluster=$CLUSTER" "${place[@]}"
}

do_logs() {
  execute gcloud container clusters get-credentials "$CLUSTER" "--project=$PROJECT" "--location=${ZONE%-*}"
  local labels=jobset.sigs.k8s.io/jobset-name=$RUN_NAME,jobset.sigs.k8s.io/job-index=0
  execute kubectl logs --follow --tail=100 --container=jax-tpu \
    "--selector=$labels,batch.kubernetes.io/job-completion-index=$WORKER"
}

do_stop() {
  execute xpk workload delete "--workload=$RUN_NAME" "--cluster=$CLUSTER" "${place[@]}"
}

do_delete() {
  execute xpk cluster delete "--cluster=$CLUSTER" "${place[@]}"
}

parse_arguments "$@"
[[ -n $ACTION ]] || usage
read_settings
need PROJECT ZONE ACCELERATOR CLUSTER
is_true_or_false SPOT
[[ $SPOT == false || -z $RESERVATION ]] || die "SPOT and RESERVATION are both set: chips are one or the other"
need_program xpk "pipx install xpk, and see https://github.com/AI-Hypercomputer/xpk for what it needs"
place=("--project=$PROJECT" "--zone=$ZONE")
do_action create run status logs stop delete

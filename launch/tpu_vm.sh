#!/usr/bin/env bash
# Trains on Cloud TPU VMs, v4 to v6e: bash launch/tpu_vm.sh [--dry-run] ACTION [flags of src.main]
#
#   create   asks for the chips: a queued resource, or at once with QUEUED=false
#   status   what became of the request, then what runs on every worker
#   setup    clones or updates the code, installs Python packages and copies DATA, on every worker
#   run      starts the training in the background of every worker; flags go to src.main
#   logs     follows the log of one worker (WORKER=0); Ctrl-C leaves the training alone
#   stop     ends the training on every worker; the chips stay and cost
#   delete   gives the chips back; checkpoints stay in the bucket
#
# Settings are in launch/cluster.env: PROJECT, ZONE, ACCELERATOR, SPOT, BUCKET, REPOSITORY, CONFIG and others.
# --dry-run prints the commands and runs nothing. Newer generations (TPU7x) need gce_mig.sh or gke_xpk.sh.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

runtime_version() {
  case $ACCELERATOR in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) die "ACCELERATOR is '$ACCELERATOR': use v4-N, v5litepod-N, v5p-N or v6e-N (TPU7x: gce_mig.sh or gke_xpk.sh)" ;;
  esac
}

# on_workers WORKERS COMMAND
on_workers() {
  if ((SLICES > 1)); then
    local nodes=all
    [[ $1 == all ]] || nodes=0
    execute gcloud compute tpus queued-resources ssh "$RUN_NAME" "${place[@]}" "--node=$nodes" "--worker=$1" \
      "--command=$2"
  else
    execute gcloud compute tpus tpu-vm ssh "$RUN_NAME" "${place[@]}" "--worker=$1" "--command=$2"
  fi
}

do_create() {
  local version extra=() flags=()
  version=${RUNTIME_VERSION:-$(runtime_version)}
  read -r -a extra <<<"$CREATE_FLAGS"
  flags=("${place[@]}" "--accelerator-type=$ACCELERATOR")
  [[ $SPOT == false ]] || flags+=(--spot)
  [[ -z $RESERVATION ]] || flags+=(--reserved)
  flags+=(${extra[@]+"${extra[@]}"})
  if [[ $QUEUED == false ]]; then
    execute gcloud compute tpus tpu-vm create "$RUN_NAME" "--version=$version" "${flags[@]}"
  elif ((SLICES > 1)); then
    execute gcloud compute tpus queued-resources create "$RUN_NAME" "--runtime-version=$version" \
      "--node-count=$SLICES" "--node-prefix=$RUN_NAME" "${flags[@]}"
  else
    execute gcloud compute tpus queued-resources create "$RUN_NAME" "--runtime-version=$version" \
      "--node-id=$RUN_NAME" "${flags[@]}"
  fi
}

do_status() {
  if [[ $QUEUED == true ]]; then
    execute gcloud compute tpus queued-resources describe "$RUN_NAME" "${place[@]}" "--format=value(state.state)"
  else
    execute gcloud compute tpus tpu-vm describe "$RUN_NAME" "${place[@]}" "--format=value(state)"
  fi
  on_workers all "$(in_checkout status)"
}

do_setup() {
  need REPOSITORY BRANCH
  on_workers all "$(fetch_checkout) && $(in_checkout setup)"
}

do_run() {
  need CONFIG
  need_workdir
  add_main_flags
  on_workers all "$(in_checkout start "${FLAGS[@]}")"
}

do_logs() {
  on_workers "$WORKER" "$(in_checkout logs)"
}

do_stop() {
  on_workers all "$(in_checkout stop)"
}

do_delete() {
  if [[ $QUEUED == true ]]; then
    # --force deletes the machines with the request.
    execute gcloud compute tpus queued-resources delete "$RUN_NAME" "${place[@]}" --force --quiet
  else
    execute gcloud compute tpus tpu-vm delete "$RUN_NAME" "${place[@]}" --quiet
  fi
}

parse_arguments "$@"
[[ -n $ACTION ]] || usage
read_settings
need PROJECT ZONE ACCELERATOR
is_true_or_false SPOT QUEUED
[[ $SPOT == false || -z $RESERVATION ]] || die "SPOT and RESERVATION are both set: chips are one or the other"
[[ $QUEUED == true || $SLICES == 1 ]] || die "SLICES is $SLICES: several slices need a queued resource (QUEUED=true)"
need_program gcloud "see https://cloud.google.com/sdk/docs/install"
place=("--project=$PROJECT" "--zone=$ZONE")
do_action create status setup run logs stop delete

#!/usr/bin/env bash
# Trains on TPUs as machines of Compute Engine, v5p, v6e and TPU7x: bash launch/gce_mig.sh [--dry-run] ACTION [flags]
#
#   create   a workload policy (how the chips are wired), an instance template and a managed instance group
#   status   the machines of the group, then what runs on each
#   setup    clones or updates the code, installs Python packages and copies DATA, on every machine
#   run      starts the training in the background of every machine; flags go to src.main
#   logs     follows the log of one machine (WORKER=0); Ctrl-C leaves the training alone
#   stop     ends the training on every machine; the chips stay and cost
#   delete   deletes group, template and policy; checkpoints stay in the bucket
#
# Settings are in launch/cluster.env: PROJECT, ZONE, MACHINE_TYPE, TOPOLOGY, SPOT, RESERVATION, BUCKET, REPOSITORY,
# CONFIG and others. --dry-run prints the commands and runs nothing.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

image_family() {
  case $MACHINE_TYPE in
    tpu7x-*) echo ubuntu-accel-2404-amd64-tpu-tpu7x ;;
    ct5p-* | ct6e-*) echo ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e ;;
    *) die "MACHINE_TYPE is '$MACHINE_TYPE': use tpu7x-…, ct6e-… or ct5p-…, or set IMAGE_FAMILY too" ;;
  esac
}

# How many machines hold the chips of TOPOLOGY: the machine's chips are the number before its final t.
machines() {
  local chips
  [[ $MACHINE_TYPE =~ -([0-9]+)t$ ]] || die "MACHINE_TYPE is '$MACHINE_TYPE': it should end in its chips, like -4t"
  local each=${BASH_REMATCH[1]}
  [[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || die "TOPOLOGY is '$TOPOLOGY': write it like 4x4 or 4x4x4"
  chips=$((${TOPOLOGY//x/ * }))
  ((chips % each == 0)) || die "TOPOLOGY $TOPOLOGY has $chips chips: choose a multiple of the $each of $MACHINE_TYPE"
  echo $((chips / each))
}

# each_machine COMMAND [FILTER]: over ssh on all machines at once, or on those that the filter of names lets pass.
each_machine() {
  local list ssh
  list=$(quoted gcloud compute instance-groups managed list-instances "$RUN_NAME" "${place[@]}" "--format=value(name)")
  ssh=$(quoted gcloud compute ssh "{}" "${place[@]}" --quiet "--command=$1")
  execute_line "$list ${2:+| $2 }| xargs -P 0 -I {} $ssh"
}

do_create() {
  local count family capacity=() group=() extra=()
  count=$(machines)
  family=${IMAGE_FAMILY:-$(image_family)}
  read -r -a extra <<<"$CREATE_FLAGS"
  if [[ $SPOT == true ]]; then
    capacity=(--provisioning-model=SPOT --instance-termination-action=DELETE)
  elif [[ -n $RESERVATION ]]; then
    capacity=(--provisioning-model=RESERVATION_BOUND --instance-termination-action=DELETE
      --reservation-affinity=specific "--reservation=$RESERVATION")
  fi
  # One machine is a slice of its own; more are wired together by a policy, appear all at once or not at all, and are
  # not replaced one by one.
  if ((count > 1)); then
    execute gcloud compute resource-policies create workload-policy "$RUN_NAME" "${region[@]}" \
      --type=HIGH_THROUGHPUT "--accelerator-topology=$TOPOLOGY" --accelerator-topology-mode=AUTO_CONNECT
    group=("--workload-policy=projects/$PROJECT/regions/$REGION/resourcePolicies/$RUN_NAME"
      --target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing)
  fi
  # TPU machines cannot move to another host, and the bucket needs the scope.
  execute gcloud compute instance-templates create "$RUN_NAME" "--project=$PROJECT" \
    "--instance-template-region=$REGION" "--machine-type=$MACHINE_TYPE" \
    --image-project=ubuntu-os-accelerator-images "--image-family=$family" "--boot-disk-type=$DISK_TYPE" \
    "--boot-disk-size=$DISK_SIZE" --maintenance-policy=TERMINATE --scopes=cloud-platform \
    ${capacity[@]+"${capacity[@]}"} ${extra[@]+"${extra[@]}"}
  execute gcloud compute instance-groups managed create "$RUN_NAME" "${place[@]}" "--size=$count" \
    "--template=projects/$PROJECT/regions/$REGION/instanceTemplates/$RUN_NAME" ${group[@]+"${group[@]}"}
  execute gcloud compute instance-groups managed wait-until "$RUN_NAME" "${place[@]}" --stable
}

do_status() {
  execute gcloud compute instance-groups managed list-instances "$RUN_NAME" "${place[@]}"
  each_machine "$(in_checkout status)"
}

do_setup() {
  need REPOSITORY BRANCH
  each_machine "$(fetch_checkout) && $(in_checkout setup)"
}

do_run() {
  need CONFIG
  need_workdir
  add_main_flags
  each_machine "$(in_checkout start "${FLAGS[@]}")"
}

do_logs() {
  each_machine "$(in_checkout logs)" "sed -n $((WORKER + 1))p"
}

do_stop() {
  each_machine "$(in_checkout stop)"
}

do_delete() {
  local count
  count=$(machines)
  execute gcloud compute instance-groups managed delete "$RUN_NAME" "${place[@]}" --quiet
  execute gcloud compute instance-templates delete "$RUN_NAME" "${region[@]}" --quiet
  if ((count > 1)); then
    execute gcloud compute resource-policies delete "$RUN_NAME" "${region[@]}" --quiet
  fi
}

parse_arguments "$@"
[[ -n $ACTION ]] || usage
read_settings
need PROJECT ZONE MACHINE_TYPE TOPOLOGY
is_true_or_false SPOT
[[ $SPOT == false || -z $RESERVATION ]] || die "SPOT and RESERVATION are both set: chips are one or the other"
[[ $SLICES == 1 ]] || die "SLICES is $SLICES: one group is one slice; use gke_xpk.sh for several"
need_program gcloud "see https://cloud.google.com/sdk/docs/install"
REGION=${ZONE%-*}
place=("--project=$PROJECT" "--zone=$ZONE")
region=("--project=$PROJECT" "--region=$REGION")
do_action create status setup run logs stop delete

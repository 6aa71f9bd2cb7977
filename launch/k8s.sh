#!/usr/bin/env bash
# Trains on Kubernetes through JobSet or Kubeflow Trainer, on TPUs of GKE or on NVIDIA GPUs:
#
#   bash launch/k8s.sh [--dry-run] ACTION [flags of src.main]
#
#   show     prints the objects that `run` gives to the cluster, as YAML
#   run      creates them; the containers clone and install the code themselves; flags go to src.main
#   status   the objects and their pods
#   logs     follows the log of one worker of the first slice (WORKER=0)
#   stop     deletes the objects; checkpoints stay in the bucket
#
# Settings are in launch/cluster.env: KIND (jobset or trainjob), ACCELERATOR, SLICES, QUEUE (of Kueue), NAMESPACE, IMAGE,
# GRACE, BUCKET, REPOSITORY, CONFIG and others. --dry-run prints the commands and runs nothing.
# The cluster needs JobSet 0.8 or newer, for KIND=trainjob Kubeflow Trainer 2.2 or newer, and Kueue if QUEUE is set.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PORT=8476 # where the processes of a run without TPUs meet

# One YAML string, of a single line.
yaml() {
  printf "'%s'" "${1//\'/\'\'}"
}

# Chips of a slice are wired as the topology says; where a size stands in its place, the usual one of that size.
topology_of() {
  local size=${ACCELERATOR#*-} chips
  if [[ $size =~ ^[0-9]+(x[0-9]+){1,2}$ ]]; then
    echo "$size"
    return
  fi
  [[ $size =~ ^[0-9]+$ ]] || die "ACCELERATOR is '$ACCELERATOR': write it like v5litepod-64, v5p-4x4x8 or gpu-16"
  chips=$size
  [[ $ACCELERATOR != v4-* && $ACCELERATOR != v5p-* ]] || chips=$((size / 2)) # they count cores, two a chip
  case $ACCELERATOR:$chips in
    v5litepod-*:1 | v6e-*:1) echo 1x1 ;;
    v5litepod-*:4 | v6e-*:4) echo 2x2 ;;
    v5litepod-*:8 | v6e-*:8) echo 2x4 ;;
    v5litepod-*:16 | v6e-*:16) echo 4x4 ;;
    v5litepod-*:32 | v6e-*:32) echo 4x8 ;;
    v5litepod-*:64 | v6e-*:64) echo 8x8 ;;
    v5litepod-*:128 | v6e-*:128) echo 8x16 ;;
    v5litepod-*:256 | v6e-*:256) echo 16x16 ;;
    v4-*:4 | v5p-*:4) echo 2x2x1 ;;
    v4-*:8 | v5p-*:8) echo 2x2x2 ;;
    v4-*:16 | v5p-*:16) echo 2x2x4 ;;
    v4-*:32 | v5p-*:32) echo 2x4x4 ;;
    v4-*:64 | v5p-*:64) echo 4x4x4 ;;
    v4-*:128 | v5p-*:128) echo 4x4x8 ;;
    v4-*:256 | v5p-*:256) echo 4x8x8 ;;
    v4-*:512 | v5p-*:512) echo 8x8x8 ;;
    *) die "ACCELERATOR is '$ACCELERATOR': give its topology, like ${ACCELERATOR%%-*}-4x4 or ${ACCELERATOR%%-*}-4x4x8" ;;
  esac
}

# Sets RESOURCE, EACH (devices of a machine), HOSTS (machines of a slice) and SELECTOR, from ACCELERATOR.
devices() {
  local label topology all
  SELECTOR=()
  case $ACCELERATOR in
    gpu-*) RESOURCE=nvidia.com/gpu EACH=${GPUS_PER_NODE:-8} all=${ACCELERATOR#gpu-} label="" ;;
    v4-*) label=tpu-v4-podslice ;;
    v5litepod-*) label=tpu-v5-lite-podslice ;;
    v5p-*) label=tpu-v5p-slice ;;
    v6e-*) label=tpu-v6e-slice ;;
    tpu7x-*) label=tpu7x ;;
    *) die "ACCELERATOR is '$ACCELERATOR': use v4-N, v5litepod-N, v5p-N, v6e-N, tpu7x-AxBxC or gpu-N" ;;
  esac
  if [[ -n $label ]]; then
    topology=$(topology_of)
    all=$((${topology//x/ * }))
    RESOURCE=google.com/tpu EACH=${CHIPS_PER_NODE:-$((all < 4 ? all : 4))}
    SELECTOR=("cloud.google.com/gke-tpu-accelerator=$label" "cloud.google.com/gke-tpu-topology=$topology")
  fi
  [[ $EACH =~ ^[1-9][0-9]*$ ]] || die "a machine has '$EACH' devices: set GPUS_PER_NODE or CHIPS_PER_NODE to a number"
  [[ $all =~ ^[1-9][0-9]*$ ]] || die "ACCELERATOR is '$ACCELERATOR': write it like gpu-16"
  ((all % EACH == 0)) || die "ACCELERATOR $ACCELERATOR has $all devices: choose a multiple of the $EACH of a machine"
  HOSTS=$((all / EACH))
  [[ $RESOURCE == google.com/tpu || $SLICES == 1 ]] || die "SLICES is $SLICES: GPUs have no slices, write gpu-N for all"
  [[ $SPOT == false ]] || SELECTOR+=(cloud.google.com/gke-spot=true)
  [[ -z $RESERVATION ]] || SELECTOR+=("cloud.google.com/reservation-name=$RESERVATION")
  local more=()
  read -r -a more <<<"$NODE_SELECTOR"
  SELECTOR+=(${more[@]+"${more[@]}"})
}

# What a container runs. Kubernetes restarts the job as a whole, so the worker itself does not.
worker() {
  local RETRIES=0 REQUIREMENTS=$REQUIREMENTS DISTRIBUTED=""
  [[ $RESOURCE == google.com/tpu ]] || REQUIREMENTS=${REQUIREMENTS:-requirements-gpu.txt}
  # Kubeflow and the lines below name the processes; several hosts of a TPU find each other from GKE's variables.
  [[ $KIND == trainjob || $RESOURCE != google.com/tpu || $HOSTS$SLICES == 11 ]] || DISTRIBUTED=auto
  local line
  line="$(fetch_checkout) && ( $(in_checkout setup) )"
  line+=" && cd $RUN_NAME && exec $(in_environment run ${FLAGS[@]+"${FLAGS[@]}"})"
  echo "${line//\$/\$\$}" # Kubernetes itself expands $(NAME), and makes $ of $$
}

pod() {
  local pair
  cat <<YAML
restartPolicy: Never
terminationGracePeriodSeconds: $GRACE
YAML
  [[ -z $SERVICE_ACCOUNT ]] || echo "serviceAccountName: $SERVICE_ACCOUNT"
  [[ ${#SELECTOR[@]} == 0 ]] || echo "nodeSelector:"
  for pair in ${SELECTOR[@]+"${SELECTOR[@]}"}; do
    echo "  ${pair%%=*}: $(yaml "${pair#*=}")"
  done
  cat <<YAML
tolerations:
- key: $RESOURCE
  operator: Exists
  effect: NoSchedule
containers:
- name: node
  image: $IMAGE
  command: [bash, -c]
  args:
  - $(yaml "$(worker)")
YAML
  [[ $KIND != jobset || $RESOURCE == google.com/tpu ]] || cat <<YAML
  env:
  - name: JAX_COORDINATOR_ADDRESS
    value: $RUN_NAME-node-0-0.$RUN_NAME:$PORT
  - name: JAX_NUM_PROCESSES
    value: '$HOSTS'
  - name: JAX_PROCESS_ID
    valueFrom:
      fieldRef:
        fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
YAML
  cat <<YAML
  resources:
    limits:
      $RESOURCE: $EACH
  volumeMounts:
  - name: shared-memory
    mountPath: /dev/shm
volumes:
- name: shared-memory
  emptyDir:
    medium: Memory
YAML
}

# A machine that is taken away restarts the run and does not count; what fails by itself counts, and RETRIES is the most.
jobset_spec() {
  cat <<YAML
failurePolicy:
  maxRestarts: $RETRIES
  rules:
  - name: disrupted
    action: RestartJobSetAndIgnoreMaxRestarts
    onJobFailureReasons: [PodFailurePolicy]
replicatedJobs:
- name: node
  replicas: $SLICES
  template:
YAML
  [[ $KIND == jobset ]] || cat <<YAML
    metadata:
      labels:
        trainer.kubeflow.org/trainjob-ancestor-step: trainer
YAML
  cat <<YAML
    spec:
      completionMode: Indexed
      completions: $HOSTS
      parallelism: $HOSTS
      backoffLimit: 0
      podFailurePolicy:
        rules:
        - action: FailJob
          onPodConditions:
          - type: DisruptionTarget
            status: 'True'
      template:
        spec:
$(pod | sed 's/^/          /')
YAML
}

# header KIND VERSION LABEL: the first lines of an object, with a label where one is given
header() {
  cat <<YAML
apiVersion: $2
kind: $1
metadata:
  name: $RUN_NAME
  namespace: $NAMESPACE
YAML
  [[ -z $3 ]] || printf '  labels:\n    %s\n' "$3"
}

objects() {
  local queue=${QUEUE:+kueue.x-k8s.io/queue-name: $QUEUE}
  if [[ $KIND == jobset ]]; then
    header JobSet jobset.x-k8s.io/v1alpha2 "$queue"
    # A slice is one node pool, and no other job may take machines of it.
    [[ $RESOURCE != google.com/tpu || $HOSTS == 1 ]] ||
      printf '  annotations:\n    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool\n'
    echo "spec:"
    jobset_spec | sed 's/^/  /'
    return
  fi
  header TrainingRuntime trainer.kubeflow.org/v1alpha1 "trainer.kubeflow.org/framework: jax"
  printf 'spec:\n  mlPolicy:\n    numNodes: %s\n    jax: {}\n  template:\n    spec:\n' "$HOSTS"
  jobset_spec | sed 's/^/      /'
  echo "---"
  header TrainJob trainer.kubeflow.org/v1alpha1 "$queue"
  cat <<YAML
spec:
  runtimeRef:
    apiGroup: trainer.kubeflow.org
    kind: TrainingRuntime
    name: $RUN_NAME
  trainer:
    numNodes: $HOSTS
YAML
}

prepare() {
  need CONFIG REPOSITORY BRANCH IMAGE
  [[ $GRACE =~ ^[1-9][0-9]*$ ]] || die "GRACE is '$GRACE': set a whole number of seconds such as 300"
  need_workdir
  add_main_flags
  [[ "${FLAGS[*]} $RUN_ENV $DATA" != *$'\n'* ]] || die "a flag or setting has a line break: write it in one line"
  devices
  [[ $KIND == jobset || $SLICES == 1 ]] || die "SLICES is $SLICES: a TrainJob is one slice; set KIND=jobset for several"
  OBJECTS=$(objects)
}

do_show() {
  prepare
  printf '%s\n' "$OBJECTS"
}

do_run() {
  prepare
  execute_line "$(quoted "${kubectl[@]}" apply -f -) <<'END'
$OBJECTS
END"
}

do_status() {
  execute "${kubectl[@]}" get "$KIND/$RUN_NAME" "--output=wide"
  execute "${kubectl[@]}" get pods "--selector=jobset.sigs.k8s.io/jobset-name=$RUN_NAME" "--output=wide"
}

do_logs() {
  local labels=jobset.sigs.k8s.io/jobset-name=$RUN_NAME,jobset.sigs.k8s.io/job-index=0
  execute "${kubectl[@]}" logs --follow --tail=100 --container=node \
    "--selector=$labels,batch.kubernetes.io/job-completion-index=$WORKER"
}

do_stop() {
  execute "${kubectl[@]}" delete "$KIND/$RUN_NAME" --ignore-not-found
  [[ $KIND == jobset ]] || execute "${kubectl[@]}" delete "trainingruntime/$RUN_NAME" --ignore-not-found
}

parse_arguments "$@"
[[ -n $ACTION ]] || usage
read_settings
need NAMESPACE ACCELERATOR
is_true_or_false SPOT
[[ $KIND == jobset || $KIND == trainjob ]] || die "KIND is '$KIND': set it to jobset or trainjob"
[[ $SPOT == false || -z $RESERVATION ]] || die "SPOT and RESERVATION are both set: chips are one or the other"
[[ $ACTION == show ]] || need_program kubectl "see https://kubernetes.io/docs/tasks/tools"
kubectl=(kubectl "--namespace=$NAMESPACE")
do_action show run status logs stop

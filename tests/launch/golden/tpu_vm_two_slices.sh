#!/bin/bash
# For `bash`, in the folder of the repository, with gcloud logged in: 2 x v4-32, 2x2x4.
set -euo pipefail

place=(--zone=us-central2-b)
nodes=(pod-run-0 pod-run-1)
gcloud compute tpus queued-resources create pod-run "${place[@]}" \
    --accelerator-type=v4-32 --runtime-version=v2-alpha-tpuv4 --node-count=2 --node-prefix=pod-run --service-account=trainer@my-project.iam.gserviceaccount.com --reserved

state=
while [[ "$state" != ACTIVE ]]; do
    state=$(gcloud compute tpus queued-resources describe pod-run "${place[@]}" --format='value(state.state)')
    echo "lm launch: pod-run is $state"
    case $state in
        ACTIVE) ;;
        FAILED | SUSPENDING | SUSPENDED) exit 1 ;;
        *) sleep 30 ;;
    esac
done

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git bundle create --quiet "$folder/lm.bundle" HEAD
cat >"$folder/lm-host.sh" <<'HOST'
set -euo pipefail
if ! command -v python3.11 >/dev/null; then  # the hosts' own Python is older
    sudo apt-get update -qq
    sudo apt-get install -y -qq python3.11 python3.11-venv
fi
if ! mountpoint -q /mnt/runs; then
    if ! command -v gcsfuse >/dev/null; then echo "gcsfuse is not on $HOSTNAME: it mounts my-runs" >&2; exit 1; fi
    sudo mkdir -p /mnt/runs
    sudo chown "$USER" /mnt/runs
    gcsfuse --implicit-dirs my-runs /mnt/runs
fi
if [[ ! -d lm-0123456789ab ]]; then git clone --quiet --no-checkout lm.bundle lm-0123456789ab; fi
cd lm-0123456789ab
git checkout --quiet 0123456789abcdef0123456789abcdef01234567
source scripts/environment.sh
prepare tpu
HOST

for node in "${nodes[@]}"; do
    gcloud compute tpus tpu-vm scp --quiet "${place[@]}" --worker=all "$folder"/lm.bundle "$folder"/lm-host.sh "$node":
    gcloud compute tpus tpu-vm ssh --quiet "${place[@]}" --worker=all "$node" --command='bash lm-host.sh'
done
for node in "${nodes[@]}"; do  # when all are ready, since the first waits for the last
    gcloud compute tpus tpu-vm ssh --quiet "${place[@]}" --worker=all "$node" \
        --command='cd lm-0123456789ab || exit 1; nohup setsid .venv/bin/lm launch pod.py --on local --max-restarts 3 --grace 300 --run-dir /mnt/runs/pod --join-timeout 3600 --mesh.slices 2 >../pod-run.log 2>&1 </dev/null &'
done

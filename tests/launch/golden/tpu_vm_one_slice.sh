#!/bin/bash
# For `bash`, in the folder of the repository, with gcloud logged in: 1 x v5litepod-16, 4x4.
set -euo pipefail

place=(--zone=us-west4-a --project=my-project)
nodes=(pod-run)
gcloud compute tpus queued-resources create pod-run "${place[@]}" \
    --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --node-id=pod-run --spot

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
        --command='cd lm-0123456789ab || exit 1; nohup setsid .venv/bin/lm launch pod.py --on local --max-restarts 3 --grace 300 --run-dir /mnt/runs/pod --join-timeout 3600 --prompts '"'"'it'"'"'"'"'"'"'"'"'s
two lines'"'"' >../pod-run.log 2>&1 </dev/null &'
done

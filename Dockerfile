# The image that `lm launch --on gke` asks for: this repository is its working folder, `lm` is on PATH.
#
#   docker build -t IMAGE .                         # for TPUs
#   docker build -t IMAGE --build-arg EXTRA=cuda .  # for NVIDIA GPUs
#
# Versions are those of constraints.txt, which are locked for this Python. It runs as root: on GKE the devices of TPUs and
# mounted buckets are root's, unless the pods of a cluster are set up otherwise.
FROM python:3.11-slim-bookworm

ARG EXTRA=tpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN [[ "$EXTRA" == tpu || "$EXTRA" == cuda ]] || { echo "EXTRA is '$EXTRA'; it should be tpu or cuda" >&2; exit 1; }

WORKDIR /lm
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY lm lm
COPY experiments experiments
RUN python -m pip install --no-cache-dir --disable-pip-version-check -c constraints.txt -e ".[$EXTRA]" \
    && lm --version

CMD ["lm", "--help"]

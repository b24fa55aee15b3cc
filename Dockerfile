# One image for head and workers, from ray up (cluster.yaml) or KubeRay (deploy/kuberay):
#   docker build -t hdistill .                                 CPU
#   docker build -t hdistill --build-arg TORCH=cuda .          CUDA
# It takes no build credentials, runs as a user without rights, and holds no data and no weights but the embedded ones.
FROM python:3.11-slim

# cpu: torch from PyTorch's own index, a tenth of the size. cuda: the default build of the package index, whose CUDA
# comes as Python packages; the machine brings the driver (580 or newer).
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# rsync: how `ray up` copies files into the container. wget: how KubeRay asks whether Ray is well. procps: `ray stop`.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends procps rsync wget \
    && rm -rf /var/lib/apt/lists/*

# Numbers and names as in Ray's own images, so that the same paths and security contexts fit both.
RUN groupadd --gid 1000 ray && useradd --create-home --uid 1000 --gid ray --shell /bin/bash ray \
    && python -m venv /opt/hdistill && chown -R ray:ray /opt/hdistill
USER ray
WORKDIR /home/ray
ENV PATH=/opt/hdistill/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# `docker run --runtime=nvidia`, which Ray uses, shows GPUs only to an image that asks.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# torch first and alone: it is most of the image, and changes least.
COPY --chown=ray:ray constraints.txt /home/ray/hdistill/
RUN case "$TORCH" in \
        cpu) pip install -c hdistill/constraints.txt --no-deps --index-url "$TORCH_INDEX" torch torchvision ;; \
        cuda) pip install -c hdistill/constraints.txt torch torchvision ;; \
        *) echo "TORCH=$TORCH: it is cpu or cuda" >&2; exit 2 ;; \
    esac

COPY --chown=ray:ray pyproject.toml README.md LICENSE /home/ray/hdistill/
COPY --chown=ray:ray hd_core /home/ray/hdistill/hd_core
COPY --chown=ray:ray pipelines /home/ray/hdistill/pipelines
COPY --chown=ray:ray tune_spaces /home/ray/hdistill/tune_spaces
RUN pip install -c hdistill/constraints.txt "./hdistill[s3]" && hdistill --version && hdistill recipes

# Work goes on here; a run directory on a volume or in a bucket outlives the container.
CMD ["hdistill", "--help"]

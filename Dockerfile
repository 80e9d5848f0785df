# The platform's images: collect | train | train-tpu | serve | mlflow. `make images` builds them, and passes what is set
# here by ARG:
#   BASE               Debian 12 with python3.11 and its venv. Pin it by digest: BASE=docker.io/library/python@sha256:...
#   TORCH_INDEX        a package index beside pip's own, with torch for CPU. Empty: pip's own alone, which for PyPI means
#                      torch for CUDA (5 GB more), as a service on GPUs wants it.
#   TRAIN_TORCH_INDEX  the same for train, which has CUDA unless this is set.
# A pip.conf given as the secret `pip` is seen while packages are installed, and not kept.
#
# An image is copied together from what other stages made: torch (a layer that images share), the other packages, this
# code. It holds no compiler, and no pip but one that BASE may have. So sampling.compile and parallel.compile need an
# image made FROM one of these, with Debian's gcc, libc6-dev and python3-dev, and on a CPU g++.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# ---- What builds, and is not shipped
FROM ${BASE} AS builder
RUN python3.11 -m venv /opt/pip && python3.11 -m venv --without-pip /opt/venv \
    && printf '/opt/torch\n/opt/genie\n' > /opt/venv/lib/python3.11/site-packages/layers.pth \
    && echo 'genie:x:10001:10001::/tmp:/usr/sbin/nologin' >> /etc/passwd && echo 'genie:x:10001:' >> /etc/group \
    && install -d -o 10001 -g 10001 /cache
ENV PATH=/opt/pip/bin:$PATH PIP_PYTHON=/opt/venv/bin/python PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build

FROM builder AS torch
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY manifests/images/requirements-torch.txt ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --target /opt/torch ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} -r requirements-torch.txt \
    && rm -rf /opt/torch/torch/test /opt/torch/torch/bin/*[tT]est*

FROM builder AS torch-train
ARG TRAIN_TORCH_INDEX=
COPY manifests/images/requirements-torch.txt ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --target /opt/torch ${TRAIN_TORCH_INDEX:+--extra-index-url $TRAIN_TORCH_INDEX} -r requirements-torch.txt \
    && rm -rf /opt/torch/torch/test /opt/torch/torch/bin/*[tT]est*

FROM builder AS torch-tpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY manifests/images/requirements-torch-tpu.txt ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --target /opt/torch ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} -r requirements-torch-tpu.txt \
    && rm -rf /opt/torch/torch/test /opt/torch/torch/bin/*[tT]est*

# --no-deps and `pip check`: a lock that lacks something does not build.
FROM torch AS collect-packages
COPY manifests/images/requirements-collect.txt ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --no-deps -r requirements-collect.txt && pip check

FROM torch-train AS train-packages
COPY manifests/images/requirements-train.txt ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --no-deps -r requirements-train.txt && pip check

FROM torch-tpu AS train-tpu-packages
COPY manifests/images/requirements-train-tpu.txt ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --no-deps -r requirements-train-tpu.txt && pip check

FROM torch AS serve-packages
COPY manifests/images/requirements-serve.txt ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --no-deps -r requirements-serve.txt && pip check

FROM builder AS mlflow-packages
COPY manifests/images/requirements-mlflow.txt ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --no-deps -r requirements-mlflow.txt && pip check

# Procgen draws on the CPU, but is linked against OpenGL: that library, without 200 MB of drivers for it.
FROM builder AS collect-libraries
RUN apt-get update && apt-get download libgl1 libglvnd0 libglx0 libx11-6 libxcb1 libxau6 libxdmcp6 libbsd0 libmd0 \
        libglib2.0-0 libpcre2-8-0 \
    && for package in *.deb; do dpkg --extract "$package" /opt/libraries; done

FROM builder AS code
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY genie_model genie_model
COPY serving serving
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    PIP_CONSTRAINT=constraints.txt pip install --no-deps --target /opt/genie .

# ---- What is shipped
FROM ${BASE} AS runtime
COPY --from=builder /etc/passwd /etc/group /etc/
COPY --from=builder --chown=10001:10001 /cache /cache
ENV PATH=/opt/venv/bin:/opt/torch/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp GENIE_CACHE_DIR=/cache
# Where GKE puts the driver's libraries into a container that asks for a GPU; elsewhere there is no such folder.
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64
USER 10001:10001
WORKDIR /tmp
# All that is written; the rest may be read-only.
VOLUME ["/tmp", "/cache"]
ARG SOURCE=
LABEL org.opencontainers.image.source=$SOURCE org.opencontainers.image.licenses=Apache-2.0

FROM runtime AS collect
COPY --from=torch /opt/torch /opt/torch
COPY --from=collect-libraries /opt/libraries/usr/lib /usr/lib
COPY --from=collect-packages /opt/venv /opt/venv
COPY --from=code /opt/genie /opt/genie
CMD ["python3", "-m", "genie_model", "--help"]
ARG VERSION=0
ARG REVISION=
ENV GENIE_GIT_COMMIT=$REVISION
LABEL org.opencontainers.image.title=genie-collect \
      org.opencontainers.image.description="Genie's pipeline steps on CPUs: data, evaluation, registry" \
      org.opencontainers.image.version=$VERSION org.opencontainers.image.revision=$REVISION

FROM runtime AS train
COPY --from=torch-train /opt/torch /opt/torch
COPY --from=train-packages /opt/venv /opt/venv
COPY --from=code /opt/genie /opt/genie
CMD ["python3", "-m", "genie_model", "--help"]
ARG VERSION=0
ARG REVISION=
ENV GENIE_GIT_COMMIT=$REVISION
LABEL org.opencontainers.image.title=genie-train \
      org.opencontainers.image.description="Genie's training on GPUs and CPUs" \
      org.opencontainers.image.version=$VERSION org.opencontainers.image.revision=$REVISION

FROM runtime AS train-tpu
COPY --from=torch-tpu /opt/torch /opt/torch
COPY --from=train-tpu-packages /opt/venv /opt/venv
COPY --from=code /opt/genie /opt/genie
ENV PJRT_DEVICE=TPU
CMD ["python3", "-m", "genie_model", "--help"]
ARG VERSION=0
ARG REVISION=
ENV GENIE_GIT_COMMIT=$REVISION
LABEL org.opencontainers.image.title=genie-train-tpu \
      org.opencontainers.image.description="Genie's training on TPUs" \
      org.opencontainers.image.version=$VERSION org.opencontainers.image.revision=$REVISION

FROM runtime AS serve
COPY --from=torch /opt/torch /opt/torch
COPY --from=serve-packages /opt/venv /opt/venv
COPY --from=code /opt/genie /opt/genie
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["python3", "-m", "serving"]
CMD ["--host", "0.0.0.0", "--port", "8000", "--log-format", "json", "--wait"]
ARG VERSION=0
ARG REVISION=
ENV GENIE_GIT_COMMIT=$REVISION
LABEL org.opencontainers.image.title=genie-serve \
      org.opencontainers.image.description="Plays the promoted Genie in the browser and over HTTP" \
      org.opencontainers.image.version=$VERSION org.opencontainers.image.revision=$REVISION

FROM runtime AS mlflow
COPY --from=mlflow-packages /opt/venv /opt/venv
# Its job runner is for LLM evaluation: eight processes and 1.2 GB that nothing here uses.
ENV MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true
EXPOSE 5000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:5000/health', timeout=4)"]
ENTRYPOINT ["mlflow", "server"]
CMD ["--host", "0.0.0.0", "--port", "5000"]
ARG VERSION=0
ARG REVISION=
LABEL org.opencontainers.image.title=genie-mlflow \
      org.opencontainers.image.description="MLflow's server for PostgreSQL and buckets of GCS or S3" \
      org.opencontainers.image.version=$VERSION org.opencontainers.image.revision=$REVISION

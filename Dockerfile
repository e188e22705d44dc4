# Three images. The default one, `runtime`, serves and extracts on CPUs, without PyTorch:
#   docker build -t regraft .
#   docker build -t regraft-gpu --target runtime-gpu .
#   docker build -t regraft-export --target export .
# Debian keeps one version of a package at a time, so a pinned one would soon not be found.
# hadolint global ignore=DL3008
ARG BASE=docker.io/library/debian:13.1-slim
ARG GPU_BASE=docker.io/nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04

# What runs: Python, a user, and nothing else.
FROM ${BASE} AS python
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
    && groupadd --gid 10001 regraft \
    && useradd --uid 10001 --gid 10001 --home-dir /cache --no-create-home regraft \
    && install --directory --owner=10001 --group=10001 --mode=0700 /cache

# What installs; none of it is in an image. Dependencies come before sources, with an empty package in
# their place, so that a change of the sources leaves that layer as it is.
FROM python AS installer
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
    && python3 -m venv /opt/pip \
    && python3 -m venv --without-pip /opt/regraft
# A file of certificate authorities, mounted into the build, where the network has its own.
ARG PIP_CERT=
ENV PIP_CERT=${PIP_CERT}
ENV PIP="/opt/pip/bin/pip --python /opt/regraft/bin/python --no-cache-dir --disable-pip-version-check"
WORKDIR /build
COPY constraints.txt ./
COPY runtime/pyproject.toml runtime/LICENSE runtime/
RUN mkdir -p runtime/src/regraft && touch runtime/src/regraft/__init__.py

FROM installer AS install-runtime
RUN ${PIP} install --constraint constraints.txt './runtime[cpu,grpc]' \
    && rm -rf runtime
COPY runtime runtime
RUN ${PIP} install --no-deps --force-reinstall ./runtime

FROM installer AS install-export
COPY export/pyproject.toml export/LICENSE export/
RUN mkdir -p export/src/regraft_export && touch export/src/regraft_export/__init__.py \
    && ${PIP} install --constraint constraints.txt './runtime[cpu,grpc,parquet]' './export[all]' \
    && rm -rf runtime export
COPY runtime runtime
COPY export export
RUN ${PIP} install --no-deps --force-reinstall ./runtime ./export

FROM python AS export
COPY --from=install-export /opt/regraft /opt/regraft
ENV PATH=/opt/regraft/bin:${PATH} REGRAFT_CACHE=/cache HOME=/cache PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /work
ENTRYPOINT ["regraft"]
CMD ["--help"]

# The same over a base that brings CUDA and cuDNN; onnxruntime-gpu takes them from there.
FROM ${GPU_BASE} AS gpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
    && groupadd --gid 10001 regraft \
    && useradd --uid 10001 --gid 10001 --home-dir /cache --no-create-home regraft \
    && install --directory --owner=10001 --group=10001 --mode=0700 /cache

FROM gpu AS install-gpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
    && python3 -m venv /opt/pip \
    && python3 -m venv --without-pip /opt/regraft
# Where the network has certificate authorities of its own, as above.
ARG PIP_CERT=
ENV PIP_CERT=${PIP_CERT}
ENV PIP="/opt/pip/bin/pip --python /opt/regraft/bin/python --no-cache-dir --disable-pip-version-check"
# `tensorrt,cuda,grpc` adds TensorRT: its package brings its own libraries, over any base.
ARG GPU_EXTRAS=cuda,grpc
WORKDIR /build
COPY constraints.txt ./
COPY runtime/pyproject.toml runtime/LICENSE runtime/
RUN mkdir -p runtime/src/regraft && touch runtime/src/regraft/__init__.py \
    && ${PIP} install --constraint constraints.txt "./runtime[${GPU_EXTRAS}]" \
    && rm -rf runtime
COPY runtime runtime
RUN ${PIP} install --no-deps --force-reinstall ./runtime

FROM gpu AS runtime-gpu
COPY --from=install-gpu /opt/regraft /opt/regraft
ENV PATH=/opt/regraft/bin:${PATH} REGRAFT_CACHE=/cache HOME=/cache PYTHONDONTWRITEBYTECODE=1 \
    REGRAFT_HOST=0.0.0.0
USER 10001:10001
WORKDIR /
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
ENTRYPOINT ["regraft"]
CMD ["serve", "/bundle"]

# Last, so that it is the default.
FROM python AS runtime
COPY --from=install-runtime /opt/regraft /opt/regraft
ENV PATH=/opt/regraft/bin:${PATH} REGRAFT_CACHE=/cache HOME=/cache PYTHONDONTWRITEBYTECODE=1 \
    REGRAFT_HOST=0.0.0.0
USER 10001:10001
WORKDIR /
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
ENTRYPOINT ["regraft"]
CMD ["serve", "/bundle"]

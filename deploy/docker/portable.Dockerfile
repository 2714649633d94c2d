# Trireme with the portable engine, on CPUs or on NVIDIA GPUs:
#
#   docker build -f deploy/docker/portable.Dockerfile -t trireme:cpu .
#   docker build -f deploy/docker/portable.Dockerfile --build-arg VARIANT=cu130 -t trireme:cuda .
#   docker run --rm -p 127.0.0.1:8000:8000 --shm-size 1g -v models:/var/cache/trireme trireme:cpu \
#     serve smollm2-135m-instruct --launcher local --host 0.0.0.0 --insecure-http-without-keys
#
# VARIANT: which build of torch, by the name of its index. EXTRAS: parts of the package; a RayService needs `serve` too.
# On Ray every node runs this same image: the ranks of a gang must be alike.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG VARIANT=cpu
ARG EXTRAS=mpich,ray,guided
RUN python -m venv /opt/trireme
ENV PATH=/opt/trireme/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# Alone, so that a change of the code fetches no torch again.
RUN pip install --index-url https://download.pytorch.org/whl/${VARIANT} 'torch>=2.11'
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY workers workers
COPY orchestrator orchestrator
COPY trireme trireme
# A link in the packages points to it.
COPY deploy deploy
RUN pip install ".[server,torch,${EXTRAS}]"

FROM python:${PYTHON}-slim
ARG VARIANT=cpu
# tini reaps what a killed gang leaves to process 1; KubeRay probes its pods by wget; Triton compiles a small C file for each kernel on a GPU.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends tini wget $(test "${VARIANT}" = cpu || echo gcc libc6-dev) \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --user-group --home-dir /var/cache/trireme --no-create-home trireme \
 && install -d -o trireme -g trireme -m 0700 /var/cache/trireme /run/trireme
COPY --from=build /opt/trireme /opt/trireme
ENV PATH=/opt/trireme/bin:$PATH HOME=/var/cache/trireme
ENV TRIREME_CACHE_DIR=/var/cache/trireme/models TRIREME_RUN_DIR=/run/trireme
ENV RAY_USAGE_STATS_ENABLED=0 NO_COLOR=1 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /var/cache/trireme
EXPOSE 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--", "trireme"]
CMD ["doctor"]

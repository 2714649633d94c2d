# Routers alone, which replicas of any cluster join: no engine, no MPI, no Ray.
#
#   docker build -f deploy/docker/router.Dockerfile -t trireme:router .
#   docker run --rm --network host -v trireme:/run/trireme -v ./router.yaml:/etc/trireme/router.yaml:ro trireme:router
#
# /run/trireme holds the keys that replicas and clients know: keep it.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
RUN python -m venv /opt/trireme
ENV PATH=/opt/trireme/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY workers workers
COPY orchestrator orchestrator
COPY trireme trireme
# A link in the packages points to it.
COPY deploy deploy
RUN pip install ".[server]"

FROM python:${PYTHON}-slim
RUN apt-get update \
 && apt-get install --yes --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --user-group --home-dir /var/cache/trireme --no-create-home trireme \
 && install -d -o trireme -g trireme -m 0700 /var/cache/trireme /run/trireme
COPY --from=build /opt/trireme /opt/trireme
ENV PATH=/opt/trireme/bin:$PATH HOME=/var/cache/trireme
ENV TRIREME_CACHE_DIR=/var/cache/trireme/models TRIREME_RUN_DIR=/run/trireme
ENV NO_COLOR=1 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /var/cache/trireme
EXPOSE 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--", "trireme"]
CMD ["router", "/etc/trireme/router.yaml"]

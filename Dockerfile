# The GPU stack of requirements/gpu.lock and this project.
#   docker build -t ptl-rl .
#   docker run --gpus all --ipc host -v RUNS:/runs ptl-rl bash launch/qwen_rl.sh --run-dir /runs/qwen
# The machine needs NVIDIA's container toolkit and driver 580 or newer. torch brings its own CUDA libraries; the C compiler
# and Python's headers are for Triton, which compiles when it runs.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04
SHELL ["/bin/bash", "-c"]
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.12 python3.12-dev python3.12-venv gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV PTL_VENV=/opt/ptl PIP_NO_CACHE_DIR=1
WORKDIR /ptl-rl
# First what the set-up reads, so that a change of code does not install everything again. A wheel of flash-attn may lie
# beside the Dockerfile: --build-arg PTL_FLASH_ATTN=./NAME.whl (docs/install.md).
COPY pyproject.toml README.md LICENSE *.whl ./
COPY requirements/gpu.lock requirements/
COPY launch/setup_gpu.sh launch/
ARG PTL_FLASH_ATTN=
RUN mkdir ptl_rl reward && touch ptl_rl/__init__.py reward/__init__.py && . launch/setup_gpu.sh
COPY . .
ENV PATH=/opt/ptl/bin:$PATH VIRTUAL_ENV=/opt/ptl
CMD ["ptl", "--help"]

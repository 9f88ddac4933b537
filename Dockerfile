# An image with the command viladiff, from this checkout. Runs and reports go to the directory that is mounted at /work:
#   docker build -t viladiff .                                # torch with its CUDA libraries; also runs without a GPU
#   docker build -t viladiff --build-arg TORCH_INDEX=URL .    # torch for processors alone, from PyTorch's index of such builds
#   docker run --rm -v "$PWD:/work" viladiff table 5          # with a GPU: docker run --gpus all --shm-size 8g ...
FROM debian:bookworm-slim
ARG TORCH_INDEX=
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN python3 -m venv /opt/viladiff \
    && /opt/viladiff/bin/python -m pip install --no-cache-dir -c /src/constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "/src[sweeps,onnx,coco]" \
    && rm -rf /src
ENV PATH=/opt/viladiff/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /work
ENTRYPOINT ["viladiff"]

# The page on port 7860; trainings with
#   docker run --volume fading-shortcuts:/app/runs fading-shortcuts accelerate launch training/train_diffusion.py --preset demo-decayed
# On a machine with a GPU: --build-arg TORCH_INDEX= for the CUDA build of torch, and `docker run --gpus all`.
FROM python:3.11-slim-bookworm
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /app
# Pillow joins the code points of an emoji with fribidi; on a GPU --compile pays, and needs a compiler
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends libfribidi0 $(case "$TORCH_INDEX" in */cpu) ;; *) echo g++ ;; esac) \
 && rm -rf /var/lib/apt/lists/*
COPY requirements.txt requirements.lock ./
# torch from its own index where that can be reached, else from the configured one
RUN pip install --no-cache-dir --no-deps --require-hashes --requirement requirements.lock \
 && pins=$(grep -E '^torch(vision)?==' requirements.txt) \
 && { [ -z "$TORCH_INDEX" ] || pip install --no-cache-dir --no-deps --retries 0 --timeout 20 --index-url "$TORCH_INDEX" $pins || true; } \
 && pip install --no-cache-dir $pins
COPY pyproject.toml ./
COPY models models
COPY training training
COPY eval eval
COPY app app
ENV PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 XDG_CACHE_HOME=/app/runs/.cache HF_HOME=/app/runs/.cache/huggingface \
    MPLCONFIGDIR=/app/runs/.cache/matplotlib TORCHINDUCTOR_CACHE_DIR=/app/runs/.cache/inductor TRITON_CACHE_DIR=/app/runs/.cache/triton
RUN python -c "from models.compat import install; install()" \
 && useradd --create-home --uid 1000 painter && mkdir runs && chown painter runs
USER painter
VOLUME /app/runs
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/', timeout=4)"]
CMD ["python", "-m", "app", "--host", "0.0.0.0", "--stop-trainings"]

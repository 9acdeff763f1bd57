# The trainer, on CPU or GPU. TORCH_INDEX_URL chooses another build of torch than the package index has,
# e.g. a CPU build, which is some gigabytes smaller.
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /app
ARG TORCH_INDEX_URL=""
ENV DS_BUILD_OPS=0
COPY pyproject.toml README.md LICENSE constraints.txt ./
RUN pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch==2.13.0
COPY atroposlib atroposlib
COPY trainer trainer
RUN pip install --no-cache-dir -c constraints.txt ".[trainer]"
RUN useradd --create-home atropos && mkdir /runs && chown atropos /runs
USER atropos
CMD ["python", "-m", "trainer.cli", "--help"]

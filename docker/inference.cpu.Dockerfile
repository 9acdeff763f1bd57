# vLLM's CPU build with our weight-transfer plugin, by the same script as on a bare machine.
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ libnuma1 && rm -rf /var/lib/apt/lists/*
WORKDIR /app
ARG TORCH_INDEX_URL=""
COPY pyproject.toml README.md LICENSE constraints.txt ./
RUN pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch==2.13.0
COPY scripts/install_vllm.sh scripts/install_vllm.sh
RUN scripts/install_vllm.sh
COPY atroposlib atroposlib
COPY trainer trainer
# Only the plugin is used here; what it needs came with vLLM.
RUN pip install --no-cache-dir --no-deps .
RUN useradd --create-home atropos
USER atropos
EXPOSE 9001
CMD ["python", "-m", "vllm.entrypoints.openai.api_server", "--help"]

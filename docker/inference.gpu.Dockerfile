# vLLM's own CUDA image with our weight-transfer plugin.
FROM vllm/vllm-openai:v0.32.0
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY atroposlib atroposlib
COPY trainer trainer
RUN pip install --no-cache-dir --no-deps .
EXPOSE 9001
ENTRYPOINT []
CMD ["python3", "-m", "vllm.entrypoints.openai.api_server", "--help"]

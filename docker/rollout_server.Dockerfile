# The rollout server. Build from the root of the repository: docker build -f docker/rollout_server.Dockerfile .
FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY atroposlib atroposlib
COPY rollout_server rollout_server
RUN pip install --no-cache-dir -c constraints.txt ".[server]"
RUN useradd --create-home atropos && mkdir /data && chown atropos /data
USER atropos
VOLUME /data
EXPOSE 8000
# Starts only with tokens (docs/operating.md): ATROPOS_SERVER_TOKENS_ENV, _TRAINER and _ADMIN, or a mounted --token-file.
CMD ["python", "-m", "rollout_server.cli", "--host", "0.0.0.0", "--port", "8000", "--data-dir", "/data"]

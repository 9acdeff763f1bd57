# An environment: the SDK and the ready environments, neither torch nor FastAPI.
FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY atroposlib atroposlib
COPY environments environments
RUN pip install --no-cache-dir -c constraints.txt ".[environments]"
RUN useradd --create-home atropos && mkdir /runs && chown atropos /runs
USER atropos
CMD ["python", "environments/chain_sum.py", "--help"]

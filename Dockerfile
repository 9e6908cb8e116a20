# Serves a saved model, as the user that may write to it, since events are kept in it, with models that were fetched:
# docker build -t llmrec . && docker run --user "$(id -u):$(id -g)" -p 8000:8000 -v ./model:/model \
#   -v ./serve.toml:/etc/llmrec/serve.toml:ro -e LLMREC_CACHE=/cache -v ~/.cache/llmrec:/cache llmrec
# serve.toml holds the keys ([[keys]]), without which nothing listens on an address that others can reach.
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY llmrec llmrec
COPY prompts prompts
RUN python -m venv /venv \
 && /venv/bin/pip install --no-cache-dir ".[lm,fetch,serve,postgres,milvus,families]" --constraint constraints.txt

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 llmrec && mkdir -p /model /etc/llmrec && chown llmrec /model
COPY --from=build /venv /venv
USER llmrec
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
VOLUME /model
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=120s --interval=10s --timeout=5s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["llmrec"]
CMD ["serve", "/model", "--host", "0.0.0.0", "--config", "/etc/llmrec/serve.toml", "--workers", "2"]

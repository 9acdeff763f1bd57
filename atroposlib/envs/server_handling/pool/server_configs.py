"""What an environment's server configs mean: one config for each inference server."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

from atroposlib.envs.server_handling.pool.slurm import slurm_urls
from atroposlib.envs.server_handling.server_baseline import APIServerConfig, ServerBaseline
from atroposlib.errors import ConfigError

log = logging.getLogger(__name__)

DEFAULT_PORTS = (9004, 9005, 9006, 9007)


def server_list(
    configs: ServerBaseline | Sequence[APIServerConfig],
    *,
    slurm: bool = False,
    environ: Mapping[str, str] | None = None,
) -> list[APIServerConfig]:
    """One config a server.

    A list is taken as it is, a bare APIServerConfig is one server, a ServerBaseline means the servers of the SLURM job
    or else four local ports. With slurm, the first config of a list is the template of the job's servers.

    Args:
        environ: where the SLURM variables are; None: this process's.
    Raises:
        ConfigError: there is none.
    """
    environ = os.environ if environ is None else environ
    if isinstance(configs, APIServerConfig):
        configs = [configs]
    if isinstance(configs, ServerBaseline):
        return _servers_of_baseline(configs, environ)
    if not configs:
        raise ConfigError(
            "an environment needs at least one inference server: give config_init() a list of APIServerConfig"
        )
    urls = slurm_urls(environ) if slurm else None
    return list(configs) if urls is None else [at_url(configs[0], url) for url in urls]


def at_url(template: APIServerConfig, base_url: str) -> APIServerConfig:
    """The same settings for a server elsewhere."""
    return template.model_copy(update={"base_url": base_url})


def with_address(config: APIServerConfig) -> APIServerConfig:
    """The config, if it says where the server is.

    Raises:
        ConfigError: base_url is empty. None is an address for the openai type only: the openai package's default.
    """
    if config.base_url or (config.base_url is None and config.server_type == "openai"):
        return config
    raise ConfigError(
        f"openai.base_url={config.base_url!r} is no address of a {config.server_type} server; "
        "give its URL, e.g. --openai.base_url http://localhost:9001/v1"
    )


def _servers_of_baseline(baseline: ServerBaseline, environ: Mapping[str, str]) -> list[APIServerConfig]:
    shared = baseline.model_dump()
    urls = slurm_urls(environ)
    if urls is None:
        urls = [f"http://localhost:{port}/v1" for port in DEFAULT_PORTS]
        log.warning(
            "config_init() returned a ServerBaseline, which has no address: assuming %d servers on localhost, ports %s; "
            "for one server return APIServerConfig(base_url=...) instead",
            len(urls), ", ".join(map(str, DEFAULT_PORTS)),
        )  # fmt: skip
    return [APIServerConfig(base_url=url, **shared) for url in urls]

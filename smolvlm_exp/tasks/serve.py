"""task=serve: an OpenAI-compatible endpoint on this machine, and a page to try it.

python -m smolvlm_exp task=serve run=last
"""

import contextlib
import logging
from pathlib import Path

from smolvlm_exp.config.schema import Config
from smolvlm_exp.deploy.export.record import read_record
from smolvlm_exp.deploy.options import require_packages
from smolvlm_exp.engine.generation.sampling import Sampling
from smolvlm_exp.tasks.chat import describe_model, load_session
from smolvlm_exp.utils.errors import RequestError
from smolvlm_exp.utils.paths import relative_to_cwd

log = logging.getLogger(__name__)


def serve(config: Config, folder: Path) -> None:
    """Answer until Ctrl-C."""
    require_packages("serve", {"fastapi": "serve", "uvicorn": "serve"})
    from smolvlm_exp.deploy.server.access import api_key
    from smolvlm_exp.deploy.server.app import Service, build_app
    from smolvlm_exp.deploy.server.connections import Server, listen
    from smolvlm_exp.deploy.server.page import examples

    host, port = config.serve.host, config.serve.port
    key = api_key(host)
    try:
        listening = listen(host, port)
    except OSError as error:
        raise RequestError(f"serve.host={host} serve.port={port}: {error.strerror}. Try another port.") from error
    with listening:
        log.info(f"loading {describe_model(config)} ...")
        session = load_session(config, rows=config.serve.max_concurrency)
        session.conversation().say("Hello", sampling=Sampling(max_new_tokens=2)).finish()  # compiles what a GPU needs
        names = served_models(config)
        service = Service(names, config.session.max_new_tokens, key, examples(config.model.id))
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        log.info(f"page: {address}; base_url for OpenAI clients: {address}/v1; model: {' or '.join(names)}")
        at_a_time, waiting = config.serve.max_concurrency, config.serve.max_waiting
        log.info(
            f"{at_a_time} answers at a time (serve.max_concurrency) and {waiting} more that wait (serve.max_waiting); "
            "further requests get status 429"
        )
        app = build_app(session, config.serve, service)
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again once it has shut down
            Server(app, session).run(sockets=[listening])


def served_models(config: Config) -> dict[str, str]:
    """By the names that requests choose them by, what each is loaded from; with an adapter the base is there too."""
    model = config.model
    if model.adapter:
        return {"tuned": str(relative_to_cwd(Path(model.adapter))), "base": model.id}
    root = str(relative_to_cwd(Path(model.id)))
    return {config.name or read_record(Path(model.id)).get("model", model.id): root}

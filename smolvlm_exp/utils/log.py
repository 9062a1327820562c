"""The package's messages, through `logging`: each module has its logger, and this is where they go.

logging.getLogger("smolvlm_exp").setLevel("WARNING")      # in a notebook; in a terminal SMOLVLM_EXP_LOG=WARNING
"""

import logging
import os
import sys


class ConsoleHandler(logging.Handler):
    """To whatever `sys.stdout` is when the message comes: a job's log, a test's capture; silence on all ranks but 0."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stdout, flush=True)


def configure_logging() -> None:
    """Show messages from INFO upwards, unless somebody has given the package's logger a handler of their own."""
    logger = logging.getLogger("smolvlm_exp")
    if not logger.handlers:
        logger.addHandler(ConsoleHandler())
        logger.setLevel(os.environ.get("SMOLVLM_EXP_LOG", "INFO").upper())
        logger.propagate = False

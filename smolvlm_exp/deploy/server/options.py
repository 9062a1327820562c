"""What a server takes from strangers, and no more."""

from dataclasses import dataclass

from smolvlm_exp.utils.fields import at_least


@dataclass
class ServeConfig:
    """task=serve."""

    host: str = "127.0.0.1"  # loopback: whoever may connect may use the model
    port: int = at_least(0, 8000)  # 0: any that is free
    max_image_megabytes: float = at_least(0, 10.0)  # of one image's file
    max_images: int = at_least(0, 8)  # in one request
    max_tokens: int = at_least(1, 1024)  # of one answer
    max_concurrency: int = at_least(1, 4)  # answers generated at once; a further request gets status 429

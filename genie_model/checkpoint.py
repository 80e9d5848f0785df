"""Models as safetensors and JSON, never pickle; whole or not there."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, Protocol

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from genie_model import files
from genie_model.backend import native
from genie_model.backend.graphs import prepare_play
from genie_model.config import Config
from genie_model.genie import Genie
from genie_model.tokenizer import VideoTokenizer


class Whole(Protocol):
    """A model that knows the config it was made from."""

    config: Config

    def state_dict(self) -> dict[str, Any]: ...


WEIGHTS, CONFIG, TRAINING = "model.safetensors", "config.json", "training.json"


def save_model(uri: str, whole: Whole, part: nn.Module | None = None) -> None:
    """A folder with the weights, of one part alone if named, and the whole `config.json`.

    The config goes last: where it lies, the model is whole. Where several processes hold its parts, all of them call
    this, and the first one writes.
    """
    tensors = _gathered((part or whole).state_dict())
    if _is_first():
        files.write_atomic(f"{uri}/{WEIGHTS}", save_tensors(tensors))
        files.write_atomic(f"{uri}/{CONFIG}", whole.config.to_json().encode())
    if dist.is_initialized():
        dist.barrier()  # none looks for it before it is there


def save_training(uri: str, came_to: Mapping[str, float]) -> None:
    """What the training of the model there came to."""
    if _is_first():
        files.write_atomic(f"{uri}/{TRAINING}", json.dumps(came_to, indent=2).encode())


def load_training(uri: str) -> dict[str, float]:
    """What `save_training` kept; nothing for a model from elsewhere."""
    path = f"{uri}/{TRAINING}"
    return dict(json.loads(files.read(path))) if files.exists(path) else {}


def is_model(uri: str) -> bool:
    """Whether a whole model lies there."""
    return files.exists(f"{uri}/{CONFIG}")


def load_model(uri: str) -> Genie:
    """The model in evaluation mode, on the accelerator if there is one.

    Raises ValueError that says what is missing or broken.
    """
    native.keep_freed_memory()
    genie = _untrained(uri)
    load_weights(genie, f"{uri}/{WEIGHTS}")
    prepare_play(genie.to(native.device()))
    return genie.eval()


def load_tokenizer(uri: str) -> VideoTokenizer:
    """The tokenizer of a folder that holds it alone, in evaluation mode. Raises as `load_model` does."""
    tokenizer = _untrained(uri).tokenizer
    load_weights(tokenizer, f"{uri}/{WEIGHTS}")
    return tokenizer.eval()


def _untrained(uri: str) -> Genie:
    return Genie(load_config(uri))


def load_config(uri: str) -> Config:
    """What a model was trained with. Raises ValueError when none lies there, or one of other code."""
    if not is_model(uri):
        raise ValueError(f"no model at {uri} (no {CONFIG} there): train one first, or check the URI")
    try:
        return Config.from_json(files.read(f"{uri}/{CONFIG}").decode())
    except ValueError as error:
        raise ValueError(f"the model at {uri} is not one that this code makes: {error}") from None


def load_weights(module: nn.Module, uri: str) -> None:
    """Fills the module. Raises ValueError when the file is missing, truncated or of another model."""
    try:
        module.load_state_dict(load_tensors(files.read(uri)))
    except FileNotFoundError:
        raise ValueError(f"no weights at {uri}") from None
    except (SafetensorError, struct.error) as error:
        raise ValueError(f"the weights at {uri} are broken ({error}): delete the folder and run again") from None
    except RuntimeError as error:
        raise ValueError(
            f"the weights at {uri} do not fit their config: {str(error).splitlines()[-1].strip()}"
        ) from None


def _gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of every tensor on the host, in the first process; nothing in the others, which help to gather the parts."""
    from torch.distributed.tensor import DTensor  # takes a second, and who only loads models needs none of it

    gathered = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if _is_first():
            gathered[name] = whole.detach().cpu().contiguous()
    return gathered


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0

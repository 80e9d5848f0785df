"""Models as safetensors and JSON, never pickle; whole or not there."""

from __future__ import annotations

import json
import struct
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from genie_model import collectives, files
from genie_model.backend import native
from genie_model.backend.graphs import prepare_play
from genie_model.config import Config, SamplingConfig
from genie_model.genie import Genie
from genie_model.tokenizer import VideoTokenizer


class Whole(Protocol):
    """A model that knows the config it was made from."""

    config: Config

    def state_dict(self) -> dict[str, Any]: ...


WEIGHTS, CONFIG, TRAINING = "model.safetensors", "config.json", "training.json"


def on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def save_model(
    uri: str, whole: Whole, part: nn.Module | None = None, gather: Callable[[Tensor], Tensor] = on_host
) -> None:
    """A folder with the weights, of one part alone if named, and the whole `config.json`.

    The config goes last: where it lies, the model is whole. Where several processes hold its parts, all of them call
    this, with what makes one tensor of those (`Backend.whole`), and the first one writes.
    """
    first, tensors = collectives.place()[0] == 0, dict[str, Tensor]()
    for name, tensor in (part or whole).state_dict().items():
        gathered = gather(tensor)
        if first:
            tensors[name] = gathered.contiguous()
    if first:
        files.write_atomic(f"{uri}/{WEIGHTS}", save_tensors(tensors))
        files.write_atomic(f"{uri}/{CONFIG}", whole.config.to_json().encode())
    collectives.meet()  # none looks for it before it is there


def save_training(uri: str, came_to: Mapping[str, float]) -> None:
    """What the training of the model there came to."""
    if collectives.place()[0] == 0:
        files.write_atomic(f"{uri}/{TRAINING}", json.dumps(came_to, indent=2).encode())


def load_training(uri: str) -> dict[str, float]:
    """What `save_training` kept; nothing for a model from elsewhere."""
    path = f"{uri}/{TRAINING}"
    return dict(json.loads(files.read(path))) if files.exists(path) else {}


def is_model(uri: str) -> bool:
    """Whether a whole model lies there."""
    return files.exists(f"{uri}/{CONFIG}")


def load_model(uri: str, sampling: SamplingConfig | None = None) -> Genie:
    """The model in evaluation mode, on the accelerator if there is one, prepared to be played with this sampling, by
    default its own.

    Raises ValueError that says what is missing or broken.
    """
    native.keep_freed_memory()
    genie = _untrained(uri)
    if sampling:
        genie.config = genie.config.model_copy(update={"sampling": sampling})
    load_weights(genie, f"{uri}/{WEIGHTS}")
    prepare_play(genie.to(native.device()))
    return genie.eval()


def load_tokenizer(uri: str) -> VideoTokenizer:
    """The tokenizer of a folder that holds it, alone or in a Genie, in evaluation mode. Raises as `load_model` does."""
    tokenizer = _untrained(uri).tokenizer
    load_weights(tokenizer, f"{uri}/{WEIGHTS}", within="tokenizer.")
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


def load_weights(module: nn.Module, uri: str, within: str = "") -> None:
    """Fills the module. Raises ValueError when the file is missing, truncated or of another model.

    The file may hold more than the module: then the module's names begin with `within` there.
    """
    try:
        tensors = load_tensors(files.read(uri))
        own = {name.removeprefix(within): tensor for name, tensor in tensors.items() if name.startswith(within)}
        module.load_state_dict(own or tensors)
    except FileNotFoundError:
        raise ValueError(f"no weights at {uri}") from None
    except (SafetensorError, struct.error) as error:
        raise ValueError(f"the weights at {uri} are broken ({error}): delete the folder and run again") from None
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()  # of another kind of model it names every tensor
        raise ValueError(f"the weights at {uri} do not fit their config: {textwrap.shorten(why, 300)}") from None

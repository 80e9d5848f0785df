"""Models and training states as safetensors and JSON, never pickle; whole or not there."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from genie_model import files
from genie_model.backend import native
from genie_model.backend.graphs import prepare_play
from genie_model.config import Config
from genie_model.genie import Genie
from genie_model.optim import Optimizers
from genie_model.tokenizer import VideoTokenizer


class Whole(Protocol):
    """A model that knows the config it was made from."""

    config: Config

    def state_dict(self) -> dict[str, Any]: ...


WEIGHTS, CONFIG, TRAINING = "model.safetensors", "config.json", "training.json"


def save_model(uri: str, whole: Whole, part: nn.Module | None = None) -> None:
    """A folder with the weights, of one part alone if named, and the whole `config.json`.

    The config goes last: where it lies, the model is whole.
    """
    _write_tensors(f"{uri}/{WEIGHTS}", (part or whole).state_dict())
    files.write_atomic(f"{uri}/{CONFIG}", whole.config.to_json().encode())


def save_training(uri: str, came_to: Mapping[str, float]) -> None:
    """What the training of the model there came to."""
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


class TrainingState:
    """Checkpoints of one training run: `<uri>/step-<n>/`, and `latest.json` that names the newest whole one.

    A kill at any instant leaves the old or the new, never half of one.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def save(self, step: int, module: nn.Module, optimizers: Optimizers) -> None:
        """State after `step` steps; the one before it is removed once this is whole."""
        before = self.latest_step()
        folder = self._folder(step)
        _write_tensors(f"{folder}/{WEIGHTS}", module.state_dict())
        _write_tensors(f"{folder}/optimizer.safetensors", optimizers.tensors(module))
        files.write_atomic(f"{self.uri}/latest.json", json.dumps({"step": step}).encode())
        if before not in (0, step):
            files.remove_tree(self._folder(before))

    def latest_step(self) -> int:
        """Steps done at the newest checkpoint; 0 when there is none."""
        if not files.exists(f"{self.uri}/latest.json"):
            return 0
        try:
            return int(json.loads(files.read(f"{self.uri}/latest.json"))["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from None

    def restore(self, module: nn.Module, optimizers: Optimizers) -> int:
        """Loads the newest checkpoint, if there is one, and returns its step."""
        step = self.latest_step()
        if step:
            load_weights(module, f"{self._folder(step)}/{WEIGHTS}")
            try:
                optimizers.fill(module, load_tensors(files.read(f"{self._folder(step)}/optimizer.safetensors")))
            except (FileNotFoundError, SafetensorError, struct.error, KeyError) as error:
                raise self._damaged(error) from None
        return step

    def remove(self) -> None:
        files.remove_tree(self.uri)

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"the checkpoint at {self.uri} is damaged ({error}): delete that folder and run again")

    def _folder(self, step: int) -> str:
        return f"{self.uri}/step-{step:07d}"


def _write_tensors(uri: str, tensors: dict[str, Tensor]) -> None:
    files.write_atomic(uri, save_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))

"""The registered model as MLflow loads it: code from this file, weights from safetensors, no pickle.

    model = mlflow.pyfunc.load_model("models:/genie@champion")
    frames = model.predict({"frames": prompt_THWC, "actions": np.array([0, 0, 3])}, params={"seed": 7})

`frames` are the prompt images, uint8 (T, H, W, 3), T >= 1; `actions` are latent actions in 0..|A|-1, int64. Returned
are the dreamt frames, uint8 (number of actions, H, W, 3).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from numpy.typing import NDArray


class GeniePythonModel(PythonModel):
    """Dreams the frames that follow the prompt when the given latent actions are taken."""

    def load_context(self, context: PythonModelContext) -> None:
        from genie_model.checkpoint import load_model

        self.genie = load_model(context.artifacts["genie"])

    def predict(
        self,
        context: PythonModelContext,
        model_input: np.ndarray,  # type: ignore[type-arg]
        params: dict[str, Any] | None = None,
    ) -> NDArray[np.uint8]:
        """`model_input` is {"frames": ..., "actions": ...}: MLflow has no quiet type hint for a mapping of arrays.

        Raises ValueError when the prompt's shape is wrong or an action is out of range.
        """
        import torch

        shape, num_actions = self.genie.config.frame_shape, self.genie.config.num_actions
        frames_THWC = np.asarray(model_input["frames"], dtype=np.uint8)
        actions = np.asarray(model_input["actions"], dtype=np.int64)
        if frames_THWC.ndim != 4 or frames_THWC.shape[1:] != shape or not len(frames_THWC):
            raise ValueError(f"frames must be uint8 of shape (T, {shape[0]}, {shape[1]}, 3), got {frames_THWC.shape}")
        if actions.ndim != 1 or not len(actions) or actions.min() < 0 or actions.max() >= num_actions:
            raise ValueError(f"actions must be a list of numbers in 0..{num_actions - 1}, got {actions.tolist()}")
        state = self.genie.start(torch.from_numpy(frames_THWC.copy())[None], seed=int((params or {}).get("seed", 0)))
        return np.stack([self.genie.step(state, torch.tensor([action]))[0].numpy() for action in actions])


set_model(GeniePythonModel())

"""What every part of the config tree is."""

from pydantic import BaseModel, ConfigDict


class ConfigNode(BaseModel):
    """A frozen node of the tree: unknown names are errors, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid")

"""Which videos are asked for by their titles and descriptions (App. B.1). The words are data: a TOML or JSON file."""

from __future__ import annotations

import functools
import json
import re
import tomllib
from importlib import resources

from pydantic import Field, ValidationError

from genie_model import files
from genie_model.config_node import ConfigNode

PLATFORMERS = "platformers"  # the name of the filter that comes with the package, beside this file


class Keywords(ConfigNode):
    """Words and phrases, found whole and in any case. A list that is empty asks for nothing."""

    title: tuple[str, ...] = Field((), description="one of them is in the title: words of the genre")
    action: tuple[str, ...] = Field((), description="one of them is in the title or the description, as 'speedrun'")
    negation: tuple[str, ...] = Field((), description="none of them is in the title, as 'unboxing'")

    @classmethod
    def read(cls, uri: str) -> Keywords:
        """The file there, or the package's own for the name "platformers". Raises ValueError saying what is wrong."""
        try:
            if uri == PLATFORMERS:
                text = resources.files("genie_model.data").joinpath(f"{uri}.toml").read_text("utf-8")
            else:
                text = files.read(uri).decode()
            return cls.model_validate(json.loads(text) if uri.endswith(".json") else tomllib.loads(text))
        except FileNotFoundError:
            raise ValueError(f"ingest.keywords: there is no file {uri}; {PLATFORMERS} is the package's own") from None
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ValueError(f"{uri}: lists of words named title, action and negation are allowed ({wrong})") from None
        except ValueError as error:
            raise ValueError(f"{uri} is no TOML, or no JSON where its name says so: {error}") from None

    def refusal(self, title: str, description: str) -> str:
        """Why a video is not taken, in one line; empty where it is."""
        if self.title and not _found(self.title, title):
            return "the title has no word of the genre"
        if self.action and not (_found(self.action, title) or _found(self.action, description)):
            return "neither title nor description has an action word"
        if unwanted := _found(self.negation, title):
            return f"the title has '{unwanted}'"
        return ""


def _found(words: tuple[str, ...], text: str) -> str:
    """The first of the words in the text, whole; empty where there is none."""
    found = _pattern(words).search(" ".join(_plain(text).split())) if words else None
    return found[0] if found else ""


@functools.cache
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{'|'.join(re.escape(_plain(word)) for word in words)})(?!\w)")


def _plain(text: str) -> str:
    """Without what differs between ways to write the same: `let's` has a curly apostrophe in many titles."""
    return text.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")

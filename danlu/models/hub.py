"""Models by their name on a hub: downloaded once, weights and tables alone, never code."""

from __future__ import annotations

import re
from pathlib import Path

from danlu.errors import ConfigError, DataError
from danlu.words import _

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WANTED = ["*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
          "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "adapter_config.json", "modules.json"]


def is_name(path: Path) -> bool:
    """Return whether `path` is no path but the name of a model on a hub: owner/name."""
    return not path.exists() and not path.parent.exists() and NAME.fullmatch(path.as_posix()) is not None


def fetch(name: str) -> Path:
    """Return the folder that holds the model, downloaded if it is not there yet; HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE count.

    Raises ConfigError without the extra, DataError where the hub does not give it.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise ConfigError(_("models are fetched from a hub by an extra"), where=name, fix='pip install "danlu[hub]"') from None
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise DataError(
            _("there is no such folder, and the hub does not give this model: {why}").format(why=why),
            where=name, fix=_("give the folder or the name of a model, for example start=path/or/owner/name; check the network")
        ) from None

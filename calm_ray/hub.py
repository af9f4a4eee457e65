"""The only module that imports huggingface_hub."""

from pathlib import Path

from calm_ray.errors import ConfigError

_TOKENIZER_FILES = [
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
    "vocab.txt",
    "*.model",
]


def fetch_tokenizer(hub_id: str, *, revision: str | None) -> Path:
    """Download the tokenizer's files and return their folder in the local cache.

    Raise ConfigError if the repository or revision is not there, is closed to us, or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    where = f"tokenizer.hub_id {hub_id!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_TOKENIZER_FILES))
    except RepositoryNotFoundError as exc:
        raise ConfigError(
            f"{where}: no such repository, or it is private; check the name, or run `hf auth login`"
        ) from exc
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as exc:
        raise ConfigError(f"{where}: cannot be downloaded: {exc}; check revision and network") from exc

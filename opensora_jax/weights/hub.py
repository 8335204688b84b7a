"""Published weights from the Hugging Face hub into a local folder; downloads continue where they stopped."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from opensora_jax.config.errors import UserError

REPOSITORIES = {  # what our presets read, under the paths that they expect below one folder
    "hpcai-tech/Open-Sora-v2": ".",  # the MMDiT, the Hunyuan VAE, T5 and CLIP
    "hpcai-tech/Open-Sora-v2-Video-DC-AE": ".",
    "black-forest-labs/FLUX.1-dev": ".",
    "hpcai-tech/OpenSora-VAE-v1.2": "OpenSora-VAE-v1.2",
    "google/t5-v1_1-xxl": "google/t5-v1_1-xxl",
    "openai/clip-vit-large-patch14": "openai/clip-vit-large-patch14",
}


def download(repository: str, folder: Path, patterns: Sequence[str], revision: str | None) -> Path:
    """Returns where the files of a repository that match `patterns` (all, if there are none) now are.

    Raises: UserError when the hub cannot be reached, does not give the files, or has none that match.
    """
    import huggingface_hub as hub  # half a second of import that nothing else needs
    from huggingface_hub.errors import HTTPError  # of the library that it uses: httpx, or httpx2 of late

    place = folder / REPOSITORIES.get(repository, repository)
    fetch: Callable[..., Any] = partial(
        hub.snapshot_download,
        repository,
        revision=revision,
        local_dir=place,
        allow_patterns=list(patterns) or None,
        max_workers=4,
    )
    try:
        # By itself the download takes a folder with files in it for the repository when it cannot reach the hub.
        wanted = [file.filename for file in fetch(dry_run=True)]
        if wanted:
            fetch(dry_run=False)
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(_explain(error, repository, place, revision)) from error
    if not wanted:
        raise UserError(f"{repository} has no file that matches {', '.join(patterns) or '*'}: give other --include.")
    if lost := [name for name in wanted if not (place / name).is_file()]:
        raise UserError(f"{repository} was cut short ({lost[0]} is missing); the same command continues it.")
    return place


def _explain(error: Exception, repository: str, place: Path, revision: str | None) -> str:
    from huggingface_hub import errors

    # These two say only that nothing came of it; what was wrong is their cause.
    if isinstance(error, (errors.DryRunError, errors.LocalEntryNotFoundError)) and isinstance(
        error.__cause__, Exception
    ):
        error = error.__cause__
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repository} asks for an agreement first: accept it on its page at huggingface.co, then log in with "
            "`hf auth login` and download again."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision!r}; leave --revision out for the newest."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"huggingface.co has no repository {repository}, or it is private; ours are {', '.join(REPOSITORIES)}."
    reason = " ".join(str(error).split())
    if isinstance(error, errors.HFValidationError):
        return f"--repo is OWNER/NAME, as on huggingface.co: got {repository!r} ({reason})"
    unreached = errors.DryRunError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HTTPError
    if isinstance(error, unreached) and not isinstance(error, errors.HfHubHTTPError):
        return (
            f"{repository} cannot be downloaded: this machine does not reach huggingface.co; download it on one that "
            f"does, copy the folder to {place}, or set HF_ENDPOINT to a mirror."
        )
    return f"{repository} cannot be downloaded ({reason}); the same command continues it."

"""Published weights from the Hugging Face hub into a local folder; downloads continue where they stopped."""

from collections.abc import Sequence
from pathlib import Path

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

    Raises: UserError when the hub cannot be reached, or does not give the files.
    """
    import huggingface_hub as hub  # half a second of import that nothing else needs
    from huggingface_hub import errors

    place = folder / REPOSITORIES.get(repository, repository)
    try:
        hub.snapshot_download(
            repository, revision=revision, local_dir=place, allow_patterns=list(patterns) or None, max_workers=4
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"{repository} asks for an agreement first: accept it on its page at huggingface.co, then log in with "
            "`hf auth login` and download again."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repository} has no revision {revision!r}; leave --revision out for the newest.") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"huggingface.co has no repository {repository}, or it is private; ours are {', '.join(REPOSITORIES)}."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise UserError(
            f"{repository} cannot be downloaded: this machine does not reach huggingface.co; download it on one that "
            f"does, copy the folder to {place}, or set HF_ENDPOINT to a mirror."
        ) from error
    except errors.HfHubHTTPError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{repository} cannot be downloaded ({reason}); the same command continues it.") from error
    return place

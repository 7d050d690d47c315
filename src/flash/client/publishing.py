"""An adapter's folder, published as a repository of the Hugging Face hub under the caller's own login.

Owns the check of the repository's name and of who will be able to read it. The hub's own client does the rest:
`HF_TOKEN` or `hf auth login` says who the caller is, `HF_ENDPOINT` where the hub is.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

from flash.errors import Conflict, FlashError, InvalidInput, Unauthorized, Unavailable

_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def check_repository(repository: str) -> str:
    """OWNER/NAME; InvalidInput for anything else."""
    if not _REPOSITORY.fullmatch(repository):
        raise InvalidInput(f"repository {repository!r:.80} is not OWNER/NAME", remedy="e.g. your-name/my-adapter")
    return repository


def publish_folder(folder: Path, repository: str, *, public: bool, message: str) -> str:
    """Uploads the folder's files in one commit, into a new private repository unless `public`; its address.

    A repository that is public already is written to only if `public` says so: Conflict otherwise.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    if not sys.stderr.isatty():
        disable_progress_bars()
    check_repository(repository)
    token = get_token()
    if token is None:
        raise Unauthorized("you are not logged in to Hugging Face", remedy="set HF_TOKEN, or run `hf auth login`")
    hub = HfApi(token=token, library_name="flash-lora")
    try:
        try:
            known = hub.model_info(repository)
        except RepositoryNotFoundError:
            hub.create_repo(repository, private=not public, exist_ok=True)
        else:
            if not known.private and not public:
                raise Conflict(f"{repository} is public", remedy="say --public, or name another repository")
        done = hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        told = error.server_message or str(error).split("\n")[0]
        if status in (401, 403):
            raise Unauthorized(
                f"Hugging Face refuses to write {repository}: {told}", remedy="use a token that may write there"
            ) from error
        raise Unavailable(f"Hugging Face did not take {repository}: {told}", remedy="try again") from error
    except FlashError:
        raise
    except Exception as error:  # what its HTTP library raises, which depends on the client's version
        told = str(error).split("\n")[0]
        remedy = "check the network, then try again"
        raise Unavailable(f"the upload to Hugging Face failed: {told}", remedy=remedy) from error
    return str(done.repo_url)

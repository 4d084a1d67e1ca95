"""An exported adapter on the Hugging Face Hub, in one commit."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from loradrop.formats.card import FOLDER, extended
from loradrop.formats.peft_file import CONFIG, TENSORS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    also: Iterable[str] = (),
) -> str:
    """Upload the adapter in `folder` to the model repository `repo_id`. Returns the commit's URL.

    The repository is made where there is none, private if `private`. A card that it has keeps its
    text and metadata, and gets our part. `token` is None for that of `hf auth login`; `also` are
    the names of other files in the folder. Raises ValueError for a public repository where
    `private` is asked for, and huggingface_hub's errors for what the Hub refuses or does not
    answer: no file is changed then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and api.model_info(repo).private is False:
        raise ValueError(
            f"the repository {repo} is there and public, so what is pushed would be, too: make it "
            f"private first (hf repos settings {repo} --private), or push to another"
        )
    ours = (folder / CARD).read_text(encoding="utf-8")
    ours = ours.replace(f"ADAPTER={FOLDER}", f"ADAPTER=$(hf download {repo})").replace(FOLDER, repo)
    existing = _card_of(api, repo)
    card = ours if existing is None else extended(existing, ours)
    files = [CommitOperationAdd(name, str(folder / name)) for name in (CONFIG, TENSORS, *also)]
    files.append(CommitOperationAdd(CARD, card.encode()))
    commit = api.create_commit(repo, files, commit_message="LoRA adapter, written by loradrop")
    return str(commit.commit_url)


def _card_of(api: "HfApi", repo: str) -> str | None:
    """The repository's card, None where the Hub says that there is none."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with tempfile.TemporaryDirectory() as folder:
        try:
            return Path(api.hf_hub_download(repo, CARD, local_dir=folder)).read_text("utf-8")
        except RemoteEntryNotFoundError:  # its parent is also what a Hub that fails comes to
            return None

"""The way to the Hugging Face Hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel

from spectral_peft.card import CARD_NAME, complete_card, loading_code


def push_to_hub(
    model: PeftModel, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, **upload: Any
) -> CommitInfo:
    """Saves the adapters of a model in a repository of the Hub, with a model card that tells how to load them.

    What `PeftModel.push_to_hub` uploads, but for the card, which that replaces by a blank one. A card that is there
    already, such as the one that a Trainer has written, is kept and completed.

    Args:
        model: A model with spectral adapters.
        repo_id: "user/name"; the repository is created if there is none.
        private: Whether a new repository is private; None leaves it to the settings of the account.
        token: As in `huggingface_hub`; None is that of `hf auth login`.
        upload: Further arguments of `HfApi.upload_folder`, such as `commit_message`, `revision` and `create_pr`.

    Returns:
        The commit.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as name:
        folder = Path(name)
        try:
            card = api.hf_hub_download(repo_id, CARD_NAME, revision=upload.get("revision"))
            shutil.copy(card, folder / CARD_NAME)
        except EntryNotFoundError:
            pass  # a new repository
        model.save_pretrained(name)
        _complete_cards(model, folder, repo_id)
        upload = {"commit_message": f"Upload {type(model).__name__}", **upload}
        return api.upload_folder(repo_id=repo_id, folder_path=folder, **upload)


def _complete_cards(model: PeftModel, folder: Path, repo_id: str) -> None:
    """Brings the Hub id into the cards; the first one is that of the repository."""
    for number, (name, config) in enumerate(model.peft_config.items()):
        subfolder = None if name == "default" else name
        loading = loading_code(config, repo_id, subfolder)
        if number == 0 or subfolder is None:
            complete_card(folder, config, loading=loading)
        if subfolder is not None:
            complete_card(folder / subfolder, config, loading=loading)

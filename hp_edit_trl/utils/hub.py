"""Repositories on the Hub: whether one can be reached, those that hold users' images, and what their cards cite."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from .secrets import redacted


# The paper that the library implements
CITATION = """\
@inproceedings{li2026hpedit,
    title = {HP-Edit: A Human-Preference Post-Training Framework for Image Editing},
    author = {Fan Li and Chonghuinan Wang and Lina Lei and Yuping Qiu and Jiaqi Xu and Jiaxiu Jiang and Xinran Qin and
        Zhikai Chen and Fenglong Song and Zhixin Wang and Renjing Pei and Wangmeng Zuo},
    booktitle = {CVPR},
    year = 2026,
    eprint = {2604.19406},
    archivePrefix = {arXiv}
}"""


def create_repository(
    repo_id: str, repo_type: str = "dataset", *, private: bool | None = True, token: str | None = None
) -> str:
    """
    Creates a repository if it does not exist.

    Args:
        repo_id (`str`):
            The repository, e.g. `"me/my-realpref"`.
        repo_type (`str`, *optional*, defaults to `"dataset"`):
            `"dataset"` or `"model"`.
        private (`bool`, *optional*, defaults to `True`):
            Whether it must be private. `None` leaves that to the organization.
        token (`str`, *optional*):
            Token with write permission. Defaults to the token of the logged-in user.

    Returns:
        `str`: its full name.

    Raises:
        `ValueError`: If `private` is set, but the repository exists and is public.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(repo_id, repo_type=repo_type).private:
        option = "hub_private_repo=False" if repo_type == "model" else "private=False (--no-private)"
        raise ValueError(
            f"{repo_id} is a public repository already: make it private in its settings, choose another one, or pass "
            f"{option}."
        )
    return repo_id


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options of loading something that say where it comes from: revision, token and cache."""
    return {name: options[name] for name in ("revision", "token", "cache_dir") if name in options}


def check_reachable(
    name: str,
    repo_type: str = "model",
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> None:
    """
    Checks that what is to be loaded is a local folder, or in the cache, or that the Hub answers, with one request. The
    libraries that load it would try each file for half a minute, and then speak of a missing file.

    Args:
        name (`str`):
            Hub id or local folder.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `"dataset"` or `"model"`.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.
        token (`str` or `bool`, *optional*):
            Token for a private repository. Defaults to the token of the logged-in user.
        cache_dir (`str` or `Path`, *optional*):
            The cache, if it is another.

    Raises:
        `FileNotFoundError`: If `name` is a path, and there is nothing.
        `ConnectionError`: If the Hub cannot be reached, and the cache has nothing of the repository.
    """
    if os.path.exists(name) or "://" in name:
        return
    shown = redacted(name)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(
            f"There is no file or folder {redacted(os.path.abspath(name))}: correct {shown!r}, or name a repository "
            "of the Hub as owner/name."
        )
    cache = Path(cache_dir or constants.HF_HUB_CACHE, f"{repo_type}s--{name.replace('/', '--')}", "snapshots")
    # `datasets` has a cache of its own, in which the names of repositories are changed.
    prepared = Path(datasets.config.HF_DATASETS_CACHE).glob(f"{name.partition('/')[0]}___*")
    if cache.exists() or (repo_type == "dataset" and any(prepared)):
        return
    try:
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        HfApi(token=token).repo_info(name, repo_type=repo_type, revision=revision, timeout=timeout)
    except (HfHubHTTPError, ValueError):  # an answer of the Hub's, of which whatever loads the repository tells more
        return
    except Exception as error:  # of the library for HTTP, which depends on the version of huggingface_hub
        kind = " --repo-type dataset" if repo_type == "dataset" else ""
        told = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{type(error).__name__}: {error}"
        raise ConnectionError(
            f"The {repo_type} {shown!r} is neither a local file or folder nor in the cache, and the Hub cannot be "
            f"reached ({redacted(told)}). Connect to the Hub, pass a local folder, or fill the cache before: "
            f"`hf download {shown}{kind}`."
        ) from error

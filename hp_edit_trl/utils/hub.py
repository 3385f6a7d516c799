"""Repositories on the Hub that hold users' images, and what their cards cite."""

from huggingface_hub import HfApi


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

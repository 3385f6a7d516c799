"""Repositories on the Hub that hold users' images."""

from huggingface_hub import HfApi


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

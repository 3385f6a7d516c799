"""Rewards by models that need an environment of their own: a server that answers with scores."""

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from ..judges import Judge, ScoreServer
from .vlm import JudgedReward, equal_areas


class HTTPReward(JudgedReward):
    """
    Reward of an edit by a server that answers with a score, for models that cannot be loaded beside the trainer.

    What is sent and what must come back is said at [`~hp_edit_trl.judges.ScoreServer`]. Requests are repeated and
    bounded as those of judges. A reward that is missing stays missing, and `load` asks for a trial, so that an address
    where nobody listens and a server with another schema show before the first rollout.

    Args:
        url (`str`, `Sequence[str]` or [`~hp_edit_trl.judges.Judge`]):
            Address that is posted to, e.g. `"http://localhost:8000/score"`, or several. A
            [`~hp_edit_trl.judges.ScoreServer`] for further settings, also behind a cache.
        normalize (`Callable[[float], float]`, *optional*):
            Makes the reward of a score, e.g. to bring it to the range from 0 to 1. By default the score is the reward.
        name (`str`, *optional*, defaults to `"http_score"`):
            Name under which scores are logged and recorded.

    Raises:
        `ImportError`: If the extra `server` is not installed.
        `ValueError`: If an address is not valid.

    Example:

    ```python
    >>> reward = HTTPReward("http://localhost:8000/score", lambda score: 1 / (1 + math.exp(-score)))
    ```
    """

    def __init__(
        self,
        url: str | Sequence[str] | Judge,
        normalize: Callable[[float], float] = float,
        name: str = "http_score",
    ):
        super().__init__(url if isinstance(url, Judge) else ScoreServer(url, name), normalize)
        self.name = name

    def questions(
        self,
        prompt: str,
        edit: Image.Image,
        references: list[Image.Image],
        task: str | None = None,
        requirement: str | None = None,
    ) -> dict[str, list[dict[str, Any]]]:
        """What is sent about one edit, as a conversation."""
        edit, references = equal_areas(edit, references)
        texts = [{"type": "text", "text": text} for text in ([prompt, requirement] if requirement else [prompt])]
        images = [{"type": "image", "image": image} for image in (*references, edit)]
        return {self.name: [{"role": "user", "content": [*texts, *images]}]}

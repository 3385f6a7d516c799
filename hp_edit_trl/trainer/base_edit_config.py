"""What both configs share: secrets among the options are not shown."""

from typing import Any

from trl.trainer.base_config import _BaseConfig

from ..utils.secrets import redacted


# A subclass is a `@dataclass(repr=False)`: otherwise the decorator would give it a `repr` of its own.
class BaseEditConfig(_BaseConfig):
    # Trackers and logs show these.
    def to_dict(self) -> dict[str, Any]:
        return redacted(super().to_dict())

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items())
        return f"{type(self).__name__}({options})"

    __str__ = __repr__

"""The eight tasks of HP-Edit. The scorer prompt of each is `prompts/<name>.md`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """
    A kind of edit.

    Args:
        name (`str`):
            Its value in the column `task`, and the name of its prompts' files.
        label (`str`):
            What people read.
        realpref_50k (`int`):
            Number of its cases in RealPref-50K (HP-Edit, table S6).
        realpref_bench (`int`):
            Number of its cases in RealPref-Bench (HP-Edit, table S6).
    """

    name: str
    label: str
    realpref_50k: int
    realpref_bench: int


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("add", "object addition", 7903, 232),
        Task("remove", "object removal", 7732, 227),
        Task("swap", "object swap", 8243, 242),
        Task("background", "background replacement", 6506, 191),
        Task("color", "color change", 6949, 204),
        Task("bokeh", "bokeh", 6813, 200),
        Task("relight", "relighting", 5109, 150),
        Task("style", "style transfer", 6540, 192),
    )
}

"""Real photographs with prompts; the photographs are those of scikit-image."""

from datasets import Dataset
from PIL import Image


# All are in the public domain or CC0, see scikit-image's data/README.txt.
CASES = [
    ("astronaut", "relight", "person", "Relight the portrait with warm evening sun from the left"),
    ("astronaut", "background", "person", "Replace the background with a desert at sunset"),
    ("astronaut", "color", "person", "Change the color of the space suit to deep red"),
    ("chelsea", "add", "cat", "Put a small orange bow tie on the cat"),
    ("chelsea", "style", "cat", "Turn the photo into a warm impressionist painting"),
    ("chelsea", "bokeh", "cat", "Keep the face of the cat sharp and blur the background"),
    ("coffee", "swap", "cup", "Replace the cup by a red clay bowl"),
    ("coffee", "remove", "spoon", "Remove the spoon from the saucer"),
    ("coffee", "relight", "cup", "Light the table with candlelight"),
    ("rocket", "background", "rocket", "Put an orange evening sky behind the rocket"),
    ("rocket", "color", "rocket", "Change the color of the rocket to red"),
    ("rocket", "remove", "tower", "Remove the lightning towers"),
]


def load_photographs() -> Dataset:
    """
    Loads twelve cases of all eight tasks on four photographs with different aspect ratios.

    Returns:
        [`~datasets.Dataset`] with `id`, `image`, `prompt`, `task`, `category` and `source`.

    Raises:
        `ImportError`: If scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError(
            "The photographs are part of scikit-image, which is not installed: pip install scikit-image"
        ) from error
    images = {name: Image.fromarray(getattr(data, name)()) for name, *_ in CASES}
    return Dataset.from_list(
        [
            {
                "id": f"{name}-{task}",
                "image": images[name],
                "prompt": prompt,
                "task": task,
                "category": category,
                "source": f"scikit-image: {name}",
            }
            for name, task, category, prompt in CASES
        ]
    )

"""
Edits of systems that diffusers does not have, as a folder that `hp-edit bench` scores: docs/other_editors.md.

    python edit_with_other_systems.py cases --dataset someone/RealPref-Bench --split test --output_dir cases
    python edit_with_other_systems.py edits --cases cases --editor my_editor.py:edit --output_dir edits/BAGEL

The first command runs in the environment of this package. It writes each case with its references, its seed and the
name of its edit. The second needs nothing but Pillow and runs in the environment of the system, on a copy of this
file. It resumes with the cases that have no edit yet.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image


# What each adapter returns: an edit of one case, from its references, its prompt and its seed
Edit = Callable[[list[Image.Image], str, int], Image.Image]


class CaseError(ValueError):
    """A case that a system cannot edit, as it is."""


def only_reference(images: Sequence[Image.Image], system: str) -> Image.Image:
    """The reference of a case. Raises a `CaseError` if there are several, which the system does not take."""
    if len(images) > 1:
        raise CaseError(f"{system} takes one reference image, but the case has {len(images)}")
    return images[0]


def step1x_edit(generator: Any, num_steps: int = 28, cfg_guidance: float = 6.0, size_level: int = 1024) -> Edit:
    """Step1X-Edit: `generator` is an `ImageGenerator` of its `inference.py`."""

    def edit(images: list[Image.Image], prompt: str, seed: int) -> Image.Image:
        return generator.generate_image(
            prompt,
            negative_prompt="",
            ref_images=only_reference(images, "Step1X-Edit"),
            num_samples=1,
            num_steps=num_steps,
            cfg_guidance=cfg_guidance,
            seed=seed,
            size_level=size_level,
        )[0]

    return edit


def bagel(inferencer: Any, set_seed: Callable[[int], Any], **options: Any) -> Edit:
    """
    BAGEL: `inferencer` is an `InterleaveInferencer` of its `inferencer.py`, `set_seed` the function of its `app.py`.
    It draws noise from torch's global generator. By default with the options of the demo's tab for edits.
    """
    options = {
        "cfg_text_scale": 4.0, "cfg_img_scale": 2.0, "cfg_interval": [0.0, 1.0], "timestep_shift": 3.0,
        "num_timesteps": 50, "cfg_renorm_min": 0.0, "cfg_renorm_type": "text_channel", **options,
    }  # fmt: skip

    def edit(images: list[Image.Image], prompt: str, seed: int) -> Image.Image:
        set_seed(1 + seed)  # it leaves the generators as they are for 0
        return inferencer(image=only_reference(images, "BAGEL"), text=prompt, **options)["image"]

    return edit


def x2edit(
    pipeline: Any,
    task_of: Callable[[str], int],
    prepare: Callable[[Image.Image], Image.Image],
    generator: Callable[[int], Any],
    **options: Any,
) -> Edit:
    """
    X2Edit: `pipeline` is the `FluxPipeline` of its `src/pipeline_1024.py`, ready as in its `infer.py`; `task_of` gives
    the number of a prompt's task there, `prepare` resizes a reference (`resize_to_bucket`), and `generator` makes a
    `torch.Generator` with a seed.
    """
    options = {
        "guidance_scale": 3.5, "num_inference_steps": 4, "max_sequence_length": 512, "offset": 128, **options,
    }  # fmt: skip

    def edit(images: list[Image.Image], prompt: str, seed: int) -> Image.Image:
        image = prepare(only_reference(images, "X2Edit"))
        width, height = ((side + 4) // 8 * 8 for side in image.size)  # as its script rounds
        return pipeline(
            prompt, task_of(prompt), height=height, width=width, subject_images=[image], generator=generator(seed),
            **options,
        ).images[0]  # fmt: skip

    return edit


def uniworld_v1(run: Callable[..., list[Image.Image]], args: Any, state: Any, set_seed: Callable[..., Any]) -> Edit:
    """
    UniWorld-V1: `run`, `set_seed` and `state` are `run_model_and_return_samples`, `set_seed` and what
    `initialize_models(args, device)` returns in its `univa/eval/imgedit/step1_gen_samples.py`; `args` is its
    configuration. It reads up to two references from files, and draws noise from torch's global generator.
    """

    def edit(images: list[Image.Image], prompt: str, seed: int) -> Image.Image:
        if len(images) > 2:
            raise CaseError(f"UniWorld-V1 takes two reference images at most, but the case has {len(images)}")
        with tempfile.TemporaryDirectory() as folder:
            paths = [str(Path(folder) / f"{i}.png") for i in range(len(images))]
            for image, path in zip(images, paths):  # noqa: B905 - its environment may have Python 3.9
                image.save(path)
            set_seed(seed, rank=0)
            return run(args, state, prompt, image1=paths[0], image2=paths[1] if len(paths) > 1 else None)[0]

    return edit


def omnigen2(pipeline: Any, generator: Callable[[int], Any], **options: Any) -> Edit:
    """
    OmniGen2: `pipeline` is its `OmniGen2Pipeline`, and `generator` makes a `torch.Generator` with a seed.
    An edit has the size of the last reference, as its readme advises, up to one megapixel.
    """
    options = {
        "num_inference_steps": 50, "max_sequence_length": 1024, "text_guidance_scale": 5.0,
        "image_guidance_scale": 2.0, "cfg_range": (0.0, 1.0), "num_images_per_prompt": 1, **options,
    }  # fmt: skip

    def edit(images: list[Image.Image], prompt: str, seed: int) -> Image.Image:
        scale = min(1.0, (1024 * 1024 / (images[-1].width * images[-1].height)) ** 0.5)
        width, height = (max(16, int(side * scale) // 16 * 16) for side in images[-1].size)
        return pipeline(
            prompt=prompt, input_images=list(images), width=width, height=height, generator=generator(seed),
            output_type="pil", **options,
        ).images[0]  # fmt: skip

    return edit


def write_cases(dataset: str, split: str, output_dir: Path, seed: int = 0, image_root: str | None = None) -> int:
    """
    Writes the cases of a dataset for another environment: `cases.json` with the id, the prompt, the seed, the paths of
    the references and the name of the edit of each, and the references. Returns their number.
    """
    from hp_edit_trl.cases import case_images, check_cases, load_split, without_decoding
    from hp_edit_trl.editors import edit_seed
    from hp_edit_trl.utils.files import file_name, write_json

    cases = without_decoding(load_split(dataset, split, image_root))
    check_cases(cases, dataset)
    if "id" not in cases.column_names:
        raise ValueError(f"{dataset} has no column 'id': an edit is found by the id of its case.")
    (output_dir / "references").mkdir(parents=True, exist_ok=True)
    rows = []
    for case in cases:
        name, references = file_name(case["id"]), []
        for i, image in enumerate(case_images(case, case["id"])):
            references.append(f"references/{name}-{i}.png")
            image.save(output_dir / references[-1])
        rows.append({"id": case["id"], "prompt": case["prompt"], "seed": edit_seed(seed, case["id"]),
                     "references": references, "edit": f"{name}.png"})  # fmt: skip
    write_json(output_dir / "cases.json", {"cases": rows})
    return len(rows)


def edit_cases(cases: Path, edit: Edit, output_dir: Path, part: int = 0, parts: int = 1) -> list[str]:
    """
    Edits every `parts`-th case that has no edit yet, and returns why cases have none. A file has its name only when
    it is whole.
    """
    rows = json.loads((cases / "cases.json").read_text(encoding="utf-8"))["cases"]
    output_dir.mkdir(parents=True, exist_ok=True)
    missing: list[str] = []
    for row in rows[part::parts]:
        file = output_dir / row["edit"]
        if file.exists():
            continue
        try:
            images = [Image.open(cases / path).convert("RGB") for path in row["references"]]
            image = edit(images, row["prompt"], row["seed"])
            if not isinstance(image, Image.Image):
                raise CaseError(f"the editor returned a {type(image).__name__}, but must return a PIL image")
        except Exception as error:  # of one case; the others are edited
            missing.append(f"{row['id']}: {type(error).__name__}: {error}")
            print(missing[-1], file=sys.stderr)
            if len(missing) == 8 and not any(output_dir.iterdir()):
                raise RuntimeError("The first eight cases failed: repair the editor and run again.") from error
            continue
        half = file.with_name(f".{file.name}.{part}")
        image.save(half, format="PNG")
        os.replace(half, file)
    return missing


def imported(path: str) -> Any:
    """What `file.py:name` stands for."""
    where, _, name = path.rpartition(":")
    if not where.endswith(".py") or not Path(where).is_file():
        raise ValueError(f"editor={path!r} is not of the form file.py:name, or there is no such file.")
    spec = importlib.util.spec_from_file_location(Path(where).stem, where)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{where} has no function {name!r}.")
    return getattr(module, name)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("cases", help="write the cases of a dataset")
    command.add_argument("--dataset", required=True)
    command.add_argument("--split", default="test")
    command.add_argument("--image_root")
    command.add_argument("--seed", type=int, default=0, help="the --seed of `hp-edit bench`")
    command.add_argument("--output_dir", type=Path, required=True)
    command = commands.add_parser("edits", help="edit them with a system of one's own")
    command.add_argument("--cases", type=Path, required=True, help="folder of the first command")
    command.add_argument("--editor", required=True, help="file.py:name of a function of references, prompt and seed")
    command.add_argument("--part", type=int, default=0, help="which part of the cases, e.g. the number of the GPU")
    command.add_argument("--parts", type=int, default=1)
    command.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(words)
    if args.command == "cases":
        number = write_cases(args.dataset, args.split, args.output_dir, args.seed, args.image_root)
        print(f"{number} cases in {args.output_dir}")
        return
    if not 0 <= args.part < args.parts:
        parser.error(f"--part {args.part} must be at least 0 and below --parts {args.parts}.")
    if not (args.cases / "cases.json").is_file():
        parser.error(f"--cases {args.cases} has no cases.json: it is written by the command `cases`.")
    missing = edit_cases(args.cases, imported(args.editor), args.output_dir, args.part, args.parts)
    print(f"{len(missing)} cases have no edit. The edits are in {args.output_dir}")


if __name__ == "__main__":
    main()
